"""transformers' modules run in another precision, product by product, their weights left as stored.

So the rounding of a layer is measured on the layer itself, and no weight is held twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def computed_in(dtype: torch.dtype) -> Any:
    """A context in which products are computed in `dtype`, from weights of another.

    In float64 nothing falls back to float32, as norms, softmax and the router do of themselves.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    products = {
        torch.nn.functional.linear,
        torch.matmul,
        torch.Tensor.matmul,
        torch.bmm,
        torch.Tensor.bmm,
        torch.einsum,
        torch.conv1d,
        torch.conv2d,
        torch.nn.functional.layer_norm,
    }
    told = {torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax, torch.Tensor.to}
    wide = dtype is torch.float64

    def cast(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    def widened(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class Computed(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, function: Any, types: Any, arguments: Any = (), named: Any = None
        ) -> Any:
            named = named or {}
            if wide and function is torch.Tensor.float:
                return arguments[0].double()
            if function in products:
                arguments = [cast(value) for value in arguments]
                named = {key: cast(value) for key, value in named.items()}
            elif wide and function in told:
                arguments = [widened(value) for value in arguments]
                named = {key: widened(value) for key, value in named.items()}
            return function(*arguments, **named)

    return Computed()
