"""The tokenizer that a run names: a file that rlgen wrote, or a published one."""

import torch

from rlgen.config.models import architecture_of, model_spec
from rlgen.config.run import TokenizerConfig
from rlgen.nn.public_files import load_public_state, read_public_state, select_state
from rlgen.storage import cached_file
from rlgen.tokenizers.load import build_tokenizer, load_tokenizer
from rlgen.tokenizers.protocol import Tokenizer


def open_tokenizer(config: TokenizerConfig, *, device: torch.device) -> Tokenizer:
    """Build and load a run's tokenizer, frozen.

    Raises:
        CheckpointError: unreadable, of another kind, or tensors that do not fit.
    """
    if config.model is None:
        location = str(cached_file(config.checkpoint, sha256=config.sha256))
        return load_tokenizer(location, device=device)
    family = model_spec(config.model).family
    state = read_public_state(config.checkpoint, sha256=config.sha256)
    tokenizer = build_tokenizer(family, architecture_of(config.model, config.architecture))
    load_public_state(
        tokenizer, select_state(state, family), config.checkpoint, model_name=config.model
    )
    return tokenizer.requires_grad_(False).eval().to(device)
