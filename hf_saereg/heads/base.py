"""What every sparse autoencoder family shares: parameters, losses, statistics.

Notable:
- a family declares three things: which latents it selects, their values, and what they cost
  (`selection`, `activate`, `sparsity`); the kernels do the rest
- losses are means over the tokens given; padding is dropped before a head ever sees it
- the head reads raw activations and returns raw reconstructions; in between it may normalise them
- what training leaves behind beside the weights (when a latent last fired, the steered coefficient)
  are buffers: saved with a head, unknown to SAELens
- names are the field's: `d_in`, `d_sae`, `W_enc`, `b_enc`, `W_dec`, `b_dec`, `hook_name`
"""

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hf_saereg import kernels
from hf_saereg.checkpoint import find_heads
from hf_saereg.heads.auxk import DeadReaders, auxk_loss
from hf_saereg.heads.config import HeadConfigError, SAEHeadConfig
from hf_saereg.heads.controller import FIRST_COEFFICIENT, steer
from hf_saereg.heads.statistics import Reconstruction, SAELosses, SiteStatistics
from hf_saereg.kernels.chunks import chunk_size, in_chunks
from hf_saereg.kernels.codes import Codes, LargestK, Selection

logger = logging.getLogger(__name__)

# enough tokens to tell dense from sparse, few enough to cost well under a percent of a step
DENSITY_SAMPLE = 64
LAYER_NORM_EPSILON = 1e-5  # SAELens's
SCALE_MOMENTUM = 0.99


class Normalised(NamedTuple):
    """Activations as a head reads them; x = `x` · `scale` + `shift`.

    Attributes:
        x: (tokens, d_in).
        scale: (), or (tokens, 1).
        shift: likewise.
    """

    x: Tensor
    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0


class SAEHead(nn.Module, ABC):
    """A sparse autoencoder on one site: x → features → x̂.

    `W_dec` starts Kaiming-uniform with fan-in `d_in` (bound √(6 / d_in)), `W_enc` as its
    transpose, biases at 0: the published initialisation.

    Args:
        config: shape, place and sparsity of the head.

    Raises:
        HeadConfigError: if the family lacks something in `config`.
    """

    architecture: ClassVar[str]
    sparsity_option: ClassVar[str] = "sparsity_coefficient"  # what sets the sparsity; else `k`
    # where a fresh head's controller starts on activations of norm √d_in: near the c of an L0 of 10
    # to 50, because the way is 2 % a step
    first_coefficient: ClassVar[float] = 1.0
    own_options: ClassVar[tuple[str, ...]] = ()  # those of FAMILY_OPTIONS that the family has
    # whether what it selects, their values and costs concern one latent each: see heads/stack.py
    stackable: ClassVar[bool] = False

    def __init__(self, config: SAEHeadConfig) -> None:
        k = config.k
        if self.sparsity_option == "k" and (k is None or not 1 <= k <= config.d_sae):
            raise HeadConfigError(
                f"k at {config.hook_name} is {k}; a {self.architecture} head needs 1 ≤ k ≤ d_sae "
                f"({config.d_sae})."
            )
        config.check_family(self.own_options)
        super().__init__()
        self.config = config
        self.kernel = "auto"  # how losses are computed: see hf_saereg.kernels.pick
        bound = math.sqrt(6 / config.d_in)
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in).uniform_(-bound, bound))
        if config.unit_decoder_norm:
            self.constrain_decoder()
        if not config.tied:
            self.W_enc = nn.Parameter(
                self.W_dec.detach().T.clone(memory_format=torch.contiguous_format)
            )
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        for name, tensor in self.initial_training_state().items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, hook_name: str, subfolder: str = "", **options: Any
    ) -> Self:
        """One head of a saved model, without the model.

        Args:
            name_or_path: a checkpoint's folder, or a repository on the Hub.
            hook_name: the head's site; of a repository no other head is downloaded.
            subfolder: of either.
            **options: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.

        Returns:
            A head of the family that was saved, in evaluation mode.

        Raises:
            UserError: if the head is missing, damaged or of another family than this class, or the
                Hub cannot be reached.
        """
        from hf_saereg.heads.folder import load_head  # it knows every family, so it imports us

        folder = find_heads(name_or_path, subfolder, [hook_name], **options)
        head = load_head(folder, hook_name)
        if not isinstance(head, cls):
            raise HeadConfigError(
                f"The head on {hook_name} in {name_or_path} is a {head.architecture} head; load it "
                f"with SAEHead.from_pretrained, not {cls.__name__}'s."
            )
        return head.eval()

    def initial_training_state(self) -> dict[str, Tensor]:
        """What training keeps beside the weights, as it is before the first step.

        Of every head `tokens_since_fired`, (d_sae,), and `was_sparse`, (), whether `auto` last
        picked a sparse kernel: a resumed run must pick the same again. With a target
        `steered_coefficient` and `smoothed_l0`, (); where activations are divided by their spread
        `scale`, ().
        """
        config = self.config
        state = {
            "tokens_since_fired": torch.zeros(config.d_sae, dtype=torch.int64),
            "was_sparse": torch.tensor(0, dtype=torch.uint8),
        }
        if config.target_l0 is not None and not config.quadratic_penalty:
            start = config.sparsity_coefficient or FIRST_COEFFICIENT
            state |= {
                "steered_coefficient": torch.tensor(start),
                "smoothed_l0": torch.tensor(0.0),  # of no step yet
            }
        if config.normalization == "variance":
            state["scale"] = torch.tensor(0.0)  # of no batch yet
        return state

    @property
    def encoder_weight(self) -> Tensor:
        """(d_in, d_sae) what the encoder multiplies by."""
        return self.W_dec.T if self.config.tied else self.W_enc

    @property
    def coefficient(self) -> Tensor | float:
        """c, weight of the sparsity loss: configured, or as the controller has steered it."""
        return self._buffers.get("steered_coefficient", self.config.sparsity_coefficient)

    @property
    def dead(self) -> Tensor:
        """(d_sae,) bool, latents that have not fired on `dead_after_tokens` tokens of training."""
        return self.tokens_since_fired >= self.config.dead_after_tokens

    @property
    def encoder_bias(self) -> Tensor:
        """(d_sae,) bias of the pre-activations that select latents."""
        return self.b_enc

    @abstractmethod
    def selection(self, x: Tensor) -> Selection:
        """Which latents can have a value or a derivative other than zero.

        Args:
            x: (tokens, d_in) what the encoder reads, `b_dec` subtracted.
        """

    @abstractmethod
    def activate(self, codes: Codes, selection: Selection) -> Tensor:
        """Feature activations in the layout of `codes`; 0 where a latent was not selected.

        Args:
            codes: pre-activations; dense codes hold those that `Above` did not select, too.
            selection: what they were selected by.
        """

    @abstractmethod
    def sparsity(self, codes: Codes, values: Tensor) -> Tensor:
        """Sparsity loss without its coefficient, in the layout of `codes`, or () where it is 0.

        Its sum over everything is a sum over tokens.
        """

    def sparsity_loss(self, sparsity: Tensor) -> Tensor:
        """S, with its coefficient, from the mean over tokens of `sparsity`, ()."""
        return self.coefficient * sparsity

    def auxiliary(self, x: Tensor, codes: Codes, kernel: ModuleType) -> Tensor:
        """Auxiliary loss, () and a **sum** over tokens; none unless a family has one.

        Args:
            x: (tokens, d_in).
            codes: of x.
            kernel: whose `decode` reads the layout of `codes`.
        """
        return x.new_zeros(())

    def saelens_options(self) -> dict[str, Any]:
        """What SAELens's configuration holds beyond, or instead of, the common fields.

        Raises:
            HeadConfigError: if SAELens has no architecture that computes what this head does.
        """
        normalised = self.config.normalization == "layer_norm"
        return {"normalize_activations": "layer_norm" if normalised else "none"}

    def saelens_weights(self) -> dict[str, Tensor]:
        """Weights by SAELens's names: all that inference on raw activations needs."""
        return self.inference_weights()

    def inference_weights(self) -> dict[str, Tensor]:
        """Weights by our names, untied and with the scale of activations folded in."""
        folded = self.config.tied or "scale" in self._buffers
        head = self.folded(1.0) if folded else self
        state = head.state_dict()
        with torch.device("meta"):  # only the names matter
            left_out = head.initial_training_state().keys()
        return {name: state[name] for name in state if name not in left_out}

    def load_saelens_weights(self, weights: dict[str, Tensor]) -> None:
        """Take weights that `saelens_weights` returned, in their dtype, as before any training.

        Args:
            weights: of the right names and shapes.
        """
        state = self.initial_training_state() | weights
        if self.config.tied:
            del state["W_enc"]
        if "scale" in state:
            state["scale"] = torch.ones(())  # it is folded into the weights
        self.load_state_dict(state, assign=True)

    def load_scaled_weights(self, trained: Self) -> None:
        """Take weights that read activations divided by their spread, with the running spread.

        `load_saelens_weights` takes them folded for raw activations, which the spread of a batch in
        training would divide once more.

        Args:
            trained: of the same shape, with normalization `variance` too.
        """
        own = dict(self.named_parameters())
        state = {**trained.state_dict(), "W_enc": trained.encoder_weight}
        taken = {name: state[name].detach().clone() for name in own} | {"scale": state["scale"]}
        self.load_state_dict(self.state_dict() | taken, assign=True)

    def normalise(self, x: Tensor) -> Normalised:
        """Activations as the encoder reads them, by `normalization`.

        `layer_norm` as SAELens computes it; `variance` divides by the root mean square over tokens
        and dimensions of x − mean(x), of the batch in training and a running mean in evaluation; on
        several processes the mean is over the tokens of the first.

        Args:
            x: (tokens, d_in), raw.
        """
        if self.config.normalization == "layer_norm":
            shift = x.mean(dim=-1, keepdim=True)
            scale = x.std(dim=-1, keepdim=True)
            return Normalised((x - shift) / (scale + LAYER_NORM_EPSILON), scale, shift)
        if self.config.normalization == "variance":
            scale = self._batch_scale(x) if self.training and len(x) > 1 else self.running_scale
            return Normalised(x / scale, scale)
        return Normalised(x)

    def _batch_scale(self, x: Tensor) -> Tensor:
        scale = (x - x.mean(dim=0)).square().mean().sqrt()
        with torch.no_grad():
            previous = self.scale.where(self.scale > 0, scale.to(self.scale))
            self.scale.copy_(torch.lerp(scale.to(previous), previous, SCALE_MOMENTUM))
        return scale

    @property
    def running_scale(self) -> Tensor | float:
        """() what raw activations are divided by in evaluation; 1 unless a batch has told it."""
        if "scale" not in self._buffers:
            return 1.0
        return self.scale.where(self.scale > 0, 1.0)

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations, (..., d_sae), of activations x, (..., d_in)."""
        flat = x.reshape(-1, self.config.d_in)  # (tokens, d_in)
        centred = self.normalise(flat).x - self.b_dec
        selection = self.selection(centred)
        codes = kernels.dense.encode(centred, self.encoder_weight, self.encoder_bias, selection)
        return self.activate(codes, selection).view(*x.shape[:-1], self.config.d_sae)

    def decode(self, features: Tensor, like: Tensor | None = None) -> Tensor:
        """Reconstruction, (..., d_in), of feature activations (..., d_sae).

        Args:
            features: what `encode` returned.
            like: (..., d_in) what it was given; layer_norm takes each token's mean and scale of it.

        Raises:
            ValueError: if `like` is needed and missing.
        """
        x_hat = features @ self.W_dec + self.b_dec
        if self.config.normalization == "layer_norm":
            if like is None:
                raise ValueError(
                    "A head with layer_norm needs the activations too, for their mean and scale: "
                    "decode(features, like=x), or call the head on x."
                )
            return x_hat * like.std(dim=-1, keepdim=True) + like.mean(dim=-1, keepdim=True)
        return x_hat * self.running_scale

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x, (..., d_in)."""
        return self.decode(self.encode(x), like=x)

    def reconstruct(self, x: Tensor) -> Reconstruction:
        """Reconstruction by the kernel that losses use, with what it cost.

        Args:
            x: (tokens, d_in), without padding; computed in the dtype of the parameters.
        """
        x = x.to(self.W_dec.dtype)
        read = self.normalise(x)
        centred = read.x - self.b_dec
        selection = self.selection(centred)
        kernel = self._pick(centred, selection)
        one_pass = partial(self._pass, kernel, selection)
        if kernel is kernels.dense:
            one_pass = partial(in_chunks, one_pass, chunk_size(x, self.config.d_sae))
        read_hat, sparsity, auxiliary, fired = one_pass(read.x, centred)
        squared_error = mse_loss(read_hat, read.x, reduction="sum")
        if self.config.auxk and self.training:
            own = DeadReaders(self.encoder_weight, self.encoder_bias, self.W_dec)
            auxiliary = auxiliary + auxk_loss(self, own, centred, (read.x - read_hat).detach())
        raw, x_hat, raw_error = read.x is x, read_hat, squared_error
        if not raw:
            x_hat = read_hat * read.scale + read.shift
            raw_error = mse_loss(x_hat.detach(), x.detach(), reduction="sum")
        return Reconstruction(
            x_hat=x_hat,
            squared_error=squared_error,
            sparsity=sparsity,
            auxiliary=auxiliary,
            norm=read.x.norm(dim=-1).sum(),
            statistics=_statistics(x.detach(), raw_error.detach(), fired),
        )

    def _pass(
        self, kernel: ModuleType, selection: Selection, x: Tensor, centred: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x̂, the sums of sparsity and auxiliary loss, and how often each latent fired."""
        codes = kernel.encode(centred, self.encoder_weight, self.encoder_bias, selection)
        values = self.activate(codes, selection)
        sparsity = self.sparsity(codes, values).sum()
        auxiliary = self.auxiliary(x, codes, kernel)
        # last, so that a backward pass that computes this again stops before the product
        x_hat = kernel.decode(values, codes, self.W_dec, self.b_dec)  # (tokens, d_in)
        fired = codes.counts(values.detach() != 0, self.config.d_sae)
        return x_hat, sparsity, auxiliary, fired

    def losses(self, x: Tensor) -> SAELosses:
        """Losses on the tokens x.

        Args:
            x: (tokens, d_in), without padding; computed in the dtype of the parameters.

        Returns:
            Means over tokens; all zero, and attached to the graph, when there is no token.
        """
        reconstruction = self.reconstruct(x)
        tokens = max(len(x), 1)
        return SAELosses(
            reconstruction=reconstruction.squared_error / tokens,
            sparsity=self.sparsity_loss(reconstruction.sparsity / tokens),
            auxiliary=reconstruction.auxiliary / tokens,
            norm=reconstruction.norm / tokens,
            statistics=reconstruction.statistics,
        )

    @torch.no_grad()
    def folded(self, scale: float | Tensor) -> Self:
        """A copy that reads raw x as this head reads `scale · x`, with the same features.

        Untied, because a scale enlarges one of the two weights and shrinks the other.

        Args:
            scale: what activations were multiplied by in training.
        """
        normalization = self.config.normalization
        if normalization == "layer_norm":
            scale = 1.0  # it does not matter to it
        if normalization == "variance":
            scale, normalization = scale / self.running_scale, "published"
        config = replace(self.config, tied=False, normalization=normalization)
        with torch.device("meta"):  # draws no random numbers
            copy = type(self)(config)
        state = {**self.state_dict(), "W_enc": self.encoder_weight}
        own = {name: state[name].detach().clone() for name in copy.state_dict()}
        copy.load_state_dict(own, assign=True)
        copy.kernel = self.kernel
        copy.W_enc.mul_(scale)
        copy.W_dec.div_(scale)
        copy.b_dec.div_(scale)
        return copy.eval()

    @torch.no_grad()
    def observe(self, fired: Tensor, tokens: Tensor) -> None:
        """What a training step leaves to do, after the optimizer's.

        Counts tokens since latents fired, steers the coefficient, keeps the decoder's norms.

        Args:
            fired: (d_sae,) tokens of the step on which each latent fired, on all processes.
            tokens: () of the step, on all processes.
        """
        self.tokens_since_fired.add_(tokens).masked_fill_(fired > 0, 0)
        if "steered_coefficient" in self._buffers:
            l0 = fired.sum() / tokens.clamp(min=1)
            steer(self.steered_coefficient, self.smoothed_l0, l0, self.config.target_l0)
        if self.config.unit_decoder_norm:
            self.constrain_decoder()

    @torch.no_grad()
    def constrain_decoder(self) -> None:
        """Give every row of `W_dec` norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    @property
    def skips_idle_latents(self) -> bool:
        """Whether the kernel in use does work for active latents alone past the encoder."""
        return bool(self.was_sparse) if self.kernel == "auto" else self.kernel != "dense"

    @torch.no_grad()
    def _pick(self, centred: Tensor, selection: Selection) -> ModuleType:
        """The kernel for these tokens; a change of mind in training is logged and remembered."""
        fast = kernels.fast_kernel(self.encoder_weight)
        if self.kernel != "auto" or fast is None:  # density does not matter
            return kernels.pick(self.kernel, 1.0, self.encoder_weight)
        density, was_sparse = self._density(centred, selection), bool(self.was_sparse)
        kernel = kernels.pick(self.kernel, density, self.encoder_weight, was_sparse)
        if self.training and was_sparse != (kernel is not kernels.dense):
            self.was_sparse.fill_(not was_sparse)
            site, names = self.config.hook_name, ("dense", fast)
            old, new = names[was_sparse], names[not was_sparse]
            logger.info("%s: density %.3f, kernel %s → %s", site, density, old, new)
        return kernel

    def _density(self, centred: Tensor, selection: Selection) -> float:
        """Fraction of latents selected, from a few tokens."""
        if isinstance(selection, LargestK):
            return selection.k / self.config.d_sae
        if len(centred) == 0:
            return 1.0
        sample = centred[:: max(1, len(centred) // DENSITY_SAMPLE)]
        pre = kernels.dense.encode(sample, self.encoder_weight, self.encoder_bias, selection).pre
        return (pre > selection.threshold).double().mean().item()


def _statistics(x: Tensor, squared_error: Tensor, fired: Tensor) -> SiteStatistics:
    # in double precision: a variance is a small difference of large sums
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)  # (tokens,)
    return SiteStatistics(
        tokens=torch.tensor(len(x), device=x.device),
        squared_error=squared_error.double(),
        x_sum=x.sum(dim=0, dtype=torch.float64),
        x_square=norms.square().sum(),
        x_norm=norms.sum(),
        fired=fired,
    )
