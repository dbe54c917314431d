"""ClipLoss and SigLipLoss with open_clip's signatures, without a B x B matrix.

In place of `from open_clip.loss import ClipLoss, SigLipLoss`.

    W ranks   b rows of each   B = W b   D width

Over ranks both return the mean loss over all B rows, the same on every rank, and gradients that DDP
averages to exactly those of that mean. open_clip differs in two ways:

- With `local_loss`, and in SigLipLoss, its value is that of this rank's rows. The mean of its
  values over ranks is this one, and the averaged gradients are equal.
- Without `gather_with_grad` its gradients lack what reaches a row through other ranks' losses: the
  averaged gradients of features are 1/W of the exact ones, and with `local_loss` not proportional
  to them. Here they are exact all the same.

Source: https://github.com/mlfoundations/open_clip, src/open_clip/loss.py.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flap_kernels.checks import check_choice, check_shape
from flap_kernels.infonce.backend import Precision
from flap_kernels.infonce.distributed import distributed_infonce
from flap_kernels.infonce.op import infonce
from flap_kernels.sigmoid_loss import sigmoid_loss

EXCHANGES = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """CLIP's symmetric loss with the signature of open_clip's ClipLoss.

    Ranks must hold equally many rows, as in open_clip. `local_loss`, `gather_with_grad` and
    `cache_labels` change nothing: see the module's docstring. `precision` and `workspace_mib` are
    those of `infonce`: under autocast open_clip rounds float32 features to autocast's type before
    the products, as `precision="bf16"` does; here the default leaves them as they are.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        precision: Precision = "ieee",
        workspace_mib: float | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False, got True; use torch.distributed")
        if world_size > 1 and not gather_with_grad:
            warnings.warn(
                "gather_with_grad=False has no effect: gradients are those of the whole batch, "
                "as open_clip has them with gather_with_grad=True; pass that",
                stacklevel=2,
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.precision: Precision = precision
        self.workspace_mib = workspace_mib

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, (), or {"contrastive_loss": loss}, of (b, D) normalised features.

        `logit_scale` and `logit_bias` are () or (1,). A bias that all logits share cancels in the
        softmax; its gradient is 0.
        """
        images, texts = _of_one_type(image_features, text_features)
        scale = _scalar("logit_scale", logit_scale)
        options = {"precision": self.precision, "workspace_mib": self.workspace_mib}
        if self.world_size > 1:
            _check_ranks(self.world_size)
            loss = distributed_infonce(images, texts, scale, equal_sizes=True, **options)
        else:
            loss = infonce(images, texts, scale, **options)
        if logit_bias is not None:
            # DDP waits for the gradient of every parameter, even one that is always 0.
            loss = loss + 0.0 * _scalar("logit_bias", logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """SigLIP's loss with the signature of open_clip's SigLipLoss.

    Ranks must hold equally many rows, as in open_clip. `cache_labels`, `dist_impl` and `chunk_size`
    change nothing. `precision` and `workspace_mib` are as in ClipLoss.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        precision: Precision = "ieee",
        workspace_mib: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("dist_impl", dist_impl or "bidir", EXCHANGES)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        self.precision: Precision = precision
        self.workspace_mib = workspace_mib

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, (), or {"contrastive_loss": loss}, of (b, D) normalised features.

        `logit_scale` and `logit_bias` are () or (1,); a bias of None is 0.
        """
        images, texts = _of_one_type(image_features, text_features)
        group = None
        if self.world_size > 1:
            _check_ranks(self.world_size)
        elif dist.is_available():
            group = dist.GroupMember.NON_GROUP_MEMBER  # this process by itself, as open_clip has it
        loss = sigmoid_loss(
            images,
            texts,
            _scalar("logit_scale", logit_scale),
            0.0 if logit_bias is None else _scalar("logit_bias", logit_bias),
            group=group,
            equal_sizes=True,
            precision=self.precision,
            workspace_mib=self.workspace_mib,
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _of_one_type(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Both features in the wider of their types: towers under autocast may return two.

    Raises unless each image has its text and no text is left over.
    """
    check_shape("image_features", images, (None, None), "(b, D)")
    check_shape("text_features", texts, images.shape, "(b, D) like image_features")
    dtype = torch.promote_types(images.dtype, texts.dtype)
    return images.to(dtype), texts.to(dtype)


def _scalar(name: str, x: Tensor | float) -> Tensor | float:
    """() of () or (1,), the shape of open_clip's `nonscalar_logit_scale`."""
    if not isinstance(x, Tensor):
        return x
    if x.numel() != 1:
        raise ValueError(f"{name} must hold one number, got shape {tuple(x.shape)}")
    return x.reshape(())


def _check_ranks(world_size: int) -> None:
    """Raise unless torch.distributed has this many ranks."""
    ready = dist.is_available() and dist.is_initialized()
    ranks = dist.get_world_size() if ready else 1
    if ranks != world_size:
        raise ValueError(f"world_size must be the number of ranks, {ranks}, got {world_size}")
