"""Write a trained policy as its public implementation stores it, so that its samplers load it.

`python -m rlgen.jobs.export --checkpoint runs/NAME/checkpoints/step-00600 --output policy.pt`
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlgen.errors import ConfigError
from rlgen.jobs.cli import run_job

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")
SAFETENSORS = ".safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, read, convert, write."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.export", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PLACE",
        help="a run's checkpoint (.../step-00600), or the .safetensors file of a policy",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help=f"{', '.join(TORCH_SUFFIXES)} (layout of the public code) or {SAFETENSORS} (flat)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="VQGAN that a taming transformer's file shall hold as well",
    )
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    given = parser.parse_args(arguments)
    export(given.checkpoint, given.output, tokenizer=given.tokenizer, force=given.force)
    print(f"{given.output}: {given.output.stat().st_size / 2**20:.1f} MiB")
    return 0


def export(
    checkpoint: str, output: Path, *, tokenizer: str | None = None, force: bool = False
) -> None:
    """Convert a policy that rlgen wrote.

    Args:
        checkpoint: path or URL of a checkpoint folder or of a policy's .safetensors file.
        output: a local path; its suffix chooses the format.
        tokenizer: path or URL of a taming VQGAN's weights, for a vqgan_gpt alone.
        force: replace an existing file.
    Raises:
        ConfigError: the output exists, has another suffix, or there is no use for a tokenizer.
        CheckpointError: the policy or the tokenizer can't be read.
        StorageError: the output can't be written.
    """
    _check_output(output, force=force)
    from rlgen.nn.public_files import read_public_state, select_state
    from rlgen.policies.public_layout import public_layout

    kind, config, state = _read_policy(checkpoint)
    first_stage = None
    if tokenizer is not None:
        if kind != "vqgan_gpt":
            raise ConfigError(
                f"--tokenizer is for a vqgan_gpt, whose public file holds both; {checkpoint} is a "
                f"{kind}: leave it out."
            )
        first_stage = select_state(read_public_state(tokenizer), "taming_vqgan")
    _write(public_layout(kind, config, state, first_stage=first_stage), output)


def _check_output(output: Path, *, force: bool) -> None:
    if output.suffix not in (*TORCH_SUFFIXES, SAFETENSORS):
        raise ConfigError(
            f"--output {output} must end in {', '.join(TORCH_SUFFIXES)} or {SAFETENSORS}."
        )
    if output.exists() and not force:
        raise ConfigError(f"--output {output} exists; name another file, or replace it by --force.")


def _read_policy(checkpoint: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Kind, config and tensors; a checkpoint's file is held against its recorded digest."""
    from safetensors.torch import load

    from rlgen.learner.checkpoint import read_part
    from rlgen.learner.state_io import POLICY
    from rlgen.nn.weights import peek_metadata, read_tensors
    from rlgen.storage import join

    if checkpoint.endswith(SAFETENSORS):
        metadata, state = peek_metadata(checkpoint), read_tensors(checkpoint)
    else:
        state = load(read_part(checkpoint, POLICY))
        metadata = peek_metadata(join(checkpoint, POLICY))
    return metadata["kind"], metadata["config"], state


def _write(layout: dict[str, Any], output: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from rlgen.errors import StorageError
    from rlgen.storage import atomic_path

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(output) as partial:
            if output.suffix != SAFETENSORS:
                torch.save(layout, partial)
                return
            # safetensors has no nesting, so the wrapper goes.
            flat = next((v for v in layout.values() if isinstance(v, dict)), layout)
            save_file({name: tensor.contiguous() for name, tensor in flat.items()}, partial)
    except OSError as error:
        raise StorageError(
            f"--output {output} can't be written ({error}); check the folder, its permissions and "
            "the free space."
        ) from error


if __name__ == "__main__":
    sys.exit(run_job(main))
