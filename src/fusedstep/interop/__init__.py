"""State to and from PyTorch, Keras and optax: begin a run there and go on here, and back.

    opt.load_state_dict(fs.interop.from_torch(opt, torch_opt.state_dict()))
    torch_opt.load_state_dict(fs.interop.to_torch(opt))

What comes from elsewhere becomes a state dict of `opt`, which :meth:`Optimizer.load_state_dict` checks whole before anything
changes. `opt` needs the convention of the other library; the parameters themselves are for the user to copy. What only `opt`
has (averages, what is kept of 16-bit parameters, ``l1``, hyper-parameters that are callables) stays when state comes in;
going out, what would change the equations there is refused.
"""

from .keras import from_keras, to_keras
from .optax import from_optax, to_optax
from .torch import from_torch, to_torch

__all__ = ["from_keras", "from_optax", "from_torch", "to_keras", "to_optax", "to_torch"]
