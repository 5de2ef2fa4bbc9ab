"""Encode prompts with a T5 from a local folder, as conditions of a text-conditional policy.

`python -m rlgen.jobs.captions --encoder flan-t5-xl --prompts prompts.txt
--output captions.safetensors` writes what policy.captions names. LlamaGen's text-conditional
models take flan-t5-xl with up to 120 tokens. How prompts are prepared, and what of LlamaGen's own
preparation is left out, stands in rlgen.policies.text_encoder. It needs `rlgen[text]`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlgen.errors import ConfigError
from rlgen.jobs.cli import run_job

LLAMAGEN_TOKENS = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, read, encode, write."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.captions", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--encoder",
        required=True,
        type=Path,
        metavar="DIR",
        help="T5 in Hugging Face's layout; flan-t5-xl for LlamaGen",
    )
    parser.add_argument(
        "--prompts", required=True, type=Path, metavar="FILE", help="text file, a prompt per line"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="path or URL of a .safetensors file, replaced if it exists",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=LLAMAGEN_TOKENS,
        metavar="N",
        help=f"longer prompts are cut; default: {LLAMAGEN_TOKENS}, as many as LlamaGen takes",
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="prompts at once; default: 8"
    )
    given = parser.parse_args(arguments)
    if not given.output.endswith(".safetensors"):
        raise ConfigError(f"--output {given.output} must end in .safetensors.")
    if given.max_tokens < 2 or given.batch < 1:
        raise ConfigError(
            f"--max-tokens {given.max_tokens} must be at least 2, a word's and the end mark, and "
            f"--batch {given.batch} at least 1."
        )
    encode_file(
        given.encoder,
        given.prompts,
        given.output,
        max_tokens=given.max_tokens,
        batch=given.batch,
    )
    return 0


def encode_file(
    encoder_folder: Path, prompts_file: Path, output: str, *, max_tokens: int, batch: int
) -> None:
    """Encode each line of a file; say how many lines were left out and how many were cut.

    Args:
        encoder_folder: a T5 in Hugging Face's layout.
        prompts_file: UTF-8; the i-th line that isn't empty becomes condition i.
        output: path or URL of the captions.
        max_tokens: tokens of a prompt, its end mark included.
        batch: prompts at once.
    Raises:
        ConfigError: no prompts, no encoder, or no transformers.
        CheckpointError: the encoder can't be read.
        StorageError: the output can't be written.
    """
    prompts, num_empty = read_prompts(prompts_file)
    import torch

    from rlgen.jobs.console import RunProgress
    from rlgen.policies.captions import save_captions
    from rlgen.policies.text_encoder import open_text_encoder
    from rlgen.storage import check_writable, without_credentials

    check_writable(output.rpartition("/")[0] or ".")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with RunProgress(1) as progress:
        progress.stage("loading the encoder")
        encoder = open_text_encoder(encoder_folder, device=device)
        num_cut = sum(count > max_tokens for count in encoder.count_tokens(prompts))
        if num_empty:
            progress.say(f"warning: empty lines left out of {prompts_file}: {num_empty}")
        if num_cut:
            progress.say(f"warning: prompts cut to --max-tokens {max_tokens}: {num_cut}")
        captions = encoder.encode(
            prompts,
            max_tokens=max_tokens,
            batch=batch,
            on_batch=lambda done, total: progress.stage("encoding", done=done, total=total),
        )
        save_captions(output, captions)
        count, length, width = captions.features_NTW.shape
        progress.say(
            f"{without_credentials(output)}: {count} captions of up to {length} tokens with "
            f"{width} features"
        )


def read_prompts(path: Path) -> tuple[list[str], int]:
    """The lines of a text file without the space around them, and how many empty ones it has.

    Raises:
        ConfigError: it can't be read, or has no prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompts {path} can't be read ({type(error).__name__}); it must be a text file in "
            "UTF-8."
        ) from None
    if lines[-1] == "":  # what follows the last line's end is no line
        lines.pop()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {path} holds no prompts; write one on each line.")
    return prompts, len(lines) - len(prompts)


if __name__ == "__main__":
    sys.exit(run_job(main))
