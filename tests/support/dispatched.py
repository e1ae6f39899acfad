"""Which operators a piece of Python calls, below autograd and autocast."""

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """In a ``with``: (name, {argument: value}) of every call, in `calls`. What an operator calls itself is not seen."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        arguments = function._schema.arguments
        given = {a.name: a.default_value for a in arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in arguments), args)) | (kwargs or {})
        self.calls.append((str(function.overloadpacket), given))
        return function(*args, **(kwargs or {}))

    def of(self, name):
        """The arguments of the calls whose names begin so."""
        return [given for called, given in self.calls if called.startswith(name)]
