"""Cases of LlamaGen's class-conditional GPT."""

import torch

from rlgen.parity.cases import Case, Outputs
from rlgen.parity.logits import forced_logits, labels_and_tokens, logit_arrays, loss_array
from rlgen.policies.llamagen import LlamaGen, LlamaGenConfig
from rlgen.types import SamplingSettings

