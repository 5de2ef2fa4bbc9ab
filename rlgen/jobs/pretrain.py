"""Train the embedded default's files, or say where they are if they are cached.

The main job does the same by itself when it needs to; this job is for doing it ahead of time,
such as while an image is built.
"""

import sys
from collections.abc import Sequence

from rlgen.jobs.cli import parse_request, run_job


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the cache lacks and print the folder."""
    request = parse_request(arguments, job="pretrain", description=(__doc__ or "").split("\n")[0])
    if request.is_dry_run:
        print(request.config.digits)
        return 0
    from rlgen.digits.assets import ensure_assets
    from rlgen.jobs.console import RunProgress

    with RunProgress(1) as progress:
        assets = ensure_assets(
            request.config.digits,
            lambda name, done, total: progress.stage(f"training {name}", done=done, total=total),
        )
        progress.say(f"the embedded default is in {assets.folder}, its policy is {assets.policy}")
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
