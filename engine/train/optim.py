"""Muon for weight matrices, AdamW for the rest.

Reference: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; AdamW:
Loshchilov and Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

__all__ = ["AdamW", "Muon", "learning_rate_factor", "orthogonalize", "split_parameters"]

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero, so small singular values grow fast


def orthogonalize(
    matrices: Tensor, num_iterations: int = 5, *, product_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Pulls the singular values of each matrix towards one, roughly into 0.7 to 1.2.

    A Newton-Schulz iteration: only products, no decomposition.

    Args:
        matrices: float [N, R, C].
        num_iterations: each multiplies small singular values by about 3.4.
        product_dtype: type of the products; bfloat16 is exact enough for a direction.
    """
    x: Tensor
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(product_dtype)
    a, b, c = _QUINTIC
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def learning_rate_factor(progress: float, *, warmup: float, decay: float) -> float:
    """Learning rate relative to its peak: linear rise, plateau, linear fall to zero.

    Args:
        progress: part of the run that is over, 0 to 1.
        warmup: part of the run that the rise takes.
        decay: part of the run that the fall takes, at the end.
    """
    rise = 1.0 if warmup <= 0 else progress / warmup
    fall = 1.0 if decay <= 0 else (1.0 - progress) / decay
    return max(0.0, min(1.0, rise, fall))


def split_parameters(
    model: nn.Module,
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The layers' weight matrices (for Muon), and all other parameters (for AdamW), by name."""
    matrices: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and "embed_tokens" not in name
        (matrices if is_matrix else others)[name] = parameter
    return matrices, others


class Muon:
    """Steps along the orthogonalised momentum of each matrix (Nesterov form).

    Args:
        parameters: matrices by name.
        peak_lr: learning rate at factor one; the update of a matrix has spectral norm about one.
        momentum: of the gradients.
        weight_decay: decoupled, multiplied by the learning rate.
        product_dtype: type of the products of `orthogonalize`.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        peak_lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        product_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._parameters = parameters
        self._peak_lr = peak_lr
        self._momentum = momentum
        self._product_dtype = product_dtype
        self._weight_decay = weight_decay
        self.state = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, lr_factor: float) -> None:
        """Applies the gradients with the peak learning rate times `lr_factor`."""
        lr = self._peak_lr * lr_factor
        by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.state[name].lerp_(parameter.grad, 1 - self._momentum)
                by_shape[parameter.shape].append(name)
        for shape, names in by_shape.items():  # one batched product for all of a shape
            steps = torch.stack(
                [_gradient(self._parameters[n]).lerp(self.state[n], self._momentum) for n in names]
            )
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            updates = orthogonalize(steps, product_dtype=self._product_dtype)
            for name, update in zip(names, updates, strict=True):
                parameter = self._parameters[name]
                parameter.mul_(1 - lr * self._weight_decay).sub_(update, alpha=lr * scale)


class AdamW:
    """AdamW without weight decay: embeddings and norms do not need any.

    Args:
        parameters: by name.
        peak_lr: learning rate at factor one.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        peak_lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ) -> None:
        self._parameters = parameters
        self._peak_lr = peak_lr
        self._betas = betas
        self._eps = eps
        self.num_steps = 0
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, lr_factor: float) -> None:
        """Applies the gradients with the peak learning rate times `lr_factor`."""
        self.num_steps += 1
        beta1, beta2 = self._betas
        correction1 = 1 - beta1**self.num_steps
        correction2 = math.sqrt(1 - beta2**self.num_steps)
        lr = self._peak_lr * lr_factor * correction2 / correction1
        for name, parameter in self._parameters.items():
            gradient = _gradient(parameter)
            first = self.first[name].lerp_(gradient, 1 - beta1)
            second = self.second[name].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            parameter.addcdiv_(first, second.sqrt().add_(self._eps), value=-lr)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
