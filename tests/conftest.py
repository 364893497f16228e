"""For all tests: tiny models, which more than one thread slows down."""
import torch

torch.set_num_threads(1)
