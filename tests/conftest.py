"""Settings of every test process; its folder is where `import tiny` finds tiny.py."""

import torch

# Several test processes share a few cores; threads would only wait for each other.
torch.set_num_threads(1)
