"""A refused call leaves a model as it was."""

from tests.contract._common import assert_equal_bits


class Untouched:
    """Context: whatever happens inside, the model is afterwards as it was before."""

    def __init__(self, model):
        self.model = model

    def _state(self):
        kinds = {name: type(module) for name, module in self.model.named_modules()}
        modes = {name: module.training for name, module in self.model.named_modules()}
        hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in self.model.named_modules()}
        trainable = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        return kinds, modes, hooks, trainable, set(getattr(self.model, "peft_config", {}))

    def __enter__(self):
        self.before = self._state()
        self.bits = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return self.model

    def __exit__(self, *error):
        if error[0] is None:
            assert self._state() == self.before
            assert_equal_bits(self.model.state_dict(), self.bits)
