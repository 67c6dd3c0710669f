"""The shape of a character GPT-2 and of its heads: options of a recipe, turned into configurations.

Notable:
- sites carry TransformerLens hook names: the input of every block, and the output of the last one
  before the final layer norm
- every list holds one value for all sites or one a site, in stream order
"""

from dataclasses import dataclass, field, fields
from typing import TypeVar

from transformers import GPT2Config, PreTrainedTokenizerBase

from hf_saereg.heads import HeadConfigError, SAEHeadConfig, SkipOptions, family_named

T = TypeVar("T")

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")  # of `GPT2Config`


def check_dropout(dropout: float) -> None:
    """Check a share of activations that is dropped.

    Raises:
        HeadConfigError: if it is none.
    """
    if not 0 <= dropout < 1:
        raise HeadConfigError(f"dropout is {dropout}; it must be from 0 to below 1.")


def gpt2_hook_names(n_layer: int) -> list[str]:
    """All `n_layer + 1` residual-stream sites, in stream order."""
    return [f"blocks.{i}.hook_resid_pre" for i in range(n_layer)] + [
        f"blocks.{n_layer - 1}.hook_resid_post"
    ]


@dataclass
class HeadsArguments(SkipOptions):
    """Options that describe the heads of one model.

    Every list takes one value for all sites or one value a site.
    """

    architecture: str = field(
        default="topk",
        metadata={"help": "Family of the heads: standard, gated, jumprelu, topk or batchtopk."},
    )
    hook_names: list[str] | None = field(
        default=None,
        metadata={"help": "Sites to regularize, e.g. blocks.0.hook_resid_pre; all by default."},
    )
    d_sae: list[int] = field(default_factory=lambda: [512], metadata={"help": "Latents a head."})
    target_l0: list[float] | None = field(
        default=None,
        metadata={
            "help": "Active latents a token: k of topk and batchtopk heads; of the others what a "
            "controller drives c to."
        },
    )
    k: list[int] | None = field(
        default=None,
        metadata={"help": "The same by its own name, and before it (topk and batchtopk heads)."},
    )
    sparsity_coefficient: list[float] | None = field(
        default=None,
        metadata={
            "help": "c, the weight of the sparsity loss (standard, gated and jumprelu heads); with "
            "target_l0 its start."
        },
    )
    reconstruction_weight: list[float] = field(
        default_factory=lambda: [3.0], metadata={"help": "λ, the weight of R + A in the term."}
    )
    normalization: str = field(
        default="published",
        metadata={
            "help": "How heads read their site and what R + A is divided by: published, detached, "
            "layer_norm or variance, whose running mean is of the first process's tokens."
        },
    )
    bandwidth: float = field(
        default=0.1, metadata={"help": "ε, the straight-through window of jumprelu heads."}
    )
    reference_window: bool = field(
        default=False, metadata={"help": "The published code's window (jumprelu heads)."}
    )
    quadratic_penalty: bool = field(
        default=False, metadata={"help": "c (L0 / target_l0 - 1)² instead of c L0 (jumprelu)."}
    )
    tied: bool = field(
        default=False, metadata={"help": "W_enc is the transpose of W_dec (standard, gated)."}
    )
    auxk: int = field(
        default=0, metadata={"help": "Dead latents that fit the error (topk and batchtopk heads)."}
    )
    auxk_coefficient: float = field(
        default=1 / 32, metadata={"help": "Weight of the dead latents' loss."}
    )
    dead_after_tokens: int = field(
        default=1_000_000, metadata={"help": "A latent that fired on none of as many is dead."}
    )
    unit_decoder_norm: bool = field(
        default=False, metadata={"help": "Keep the rows of W_dec at norm 1."}
    )

    def head_configs(self, model_config: GPT2Config) -> list[SAEHeadConfig]:
        """One configuration a site.

        Args:
            model_config: of the model that the heads will sit on.

        Raises:
            HeadConfigError: for an unknown or repeated site, a list of the wrong length, or sizes
                and weights that no head can have.
        """
        sites = gpt2_hook_names(model_config.n_layer)
        hook_names = sites if self.hook_names is None else self.hook_names
        for hook_name in hook_names:
            if hook_name not in sites:
                raise HeadConfigError(
                    f"Unknown hook name {hook_name!r}; this model has {', '.join(sites)}."
                )
        if not hook_names or len(set(hook_names)) < len(hook_names):
            raise HeadConfigError(
                f"hook_names is {hook_names}; name at least one site, and each site once."
            )
        hook_names = sorted(hook_names, key=sites.index)
        by_site = {
            "d_sae": self.d_sae,
            **self.sparsity(),
            "reconstruction_weight": self.reconstruction_weight,
        }
        own = {name: one_a_site(name, values, len(hook_names)) for name, values in by_site.items()}
        shared = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.name not in (*by_site, "hook_names")
        }
        return [
            SAEHeadConfig(
                hook_name=hook_name,
                d_in=model_config.n_embd,
                **shared,
                **{name: values[i] for name, values in own.items()},
            )
            for i, hook_name in enumerate(hook_names)
        ]

    def sparsity(self) -> dict[str, list]:
        """`k`, `target_l0` and `sparsity_coefficient`: values of what the family reads.

        Raises:
            HeadConfigError: if nothing says how sparse the heads shall be, an option says it that
                the family does not read, or k is no whole number.
        """
        has_k = family_named(self.architecture).sparsity_option == "k"
        own, foreign = ("k", "sparsity_coefficient") if has_k else ("sparsity_coefficient", "k")
        if getattr(self, foreign):
            raise HeadConfigError(
                f"{self.architecture} heads do not read {foreign}; take it out, of the YAML file "
                f"too, and give target_l0, which every family reads, or {own}."
            )
        k = self.k or self.target_l0
        if not (k if has_k else self.target_l0 or self.sparsity_coefficient):
            raise HeadConfigError(
                f"Nothing says how sparse the {self.architecture} heads shall be; give target_l0 "
                f"or {own}."
            )
        if not has_k:
            coefficients = self.sparsity_coefficient or [0.0]
            target = self.target_l0 or [None]
            return {"k": [None], "target_l0": target, "sparsity_coefficient": coefficients}
        if broken := [number for number in k if number != int(number)]:
            raise HeadConfigError(
                f"target_l0 is {broken[0]}, but {self.architecture} heads keep a whole number of "
                "latents."
            )
        k = [int(number) for number in k]
        return {"k": k, "target_l0": [None], "sparsity_coefficient": [0.0]}


@dataclass
class CharacterModelArguments:
    """Shape of the language model; its context is one block of the corpus."""

    n_layer: int = field(default=4, metadata={"help": "Transformer blocks."})
    n_head: int = field(default=4, metadata={"help": "Attention heads a block."})
    n_embd: int = field(default=64, metadata={"help": "Width of the residual stream."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout, everywhere."})

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise HeadConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.n_embd % self.n_head:
            raise HeadConfigError(
                f"n_embd ({self.n_embd}) is no multiple of n_head ({self.n_head}); choose widths "
                "that divide evenly."
            )
        check_dropout(self.dropout)

    def config(self, context: int, tokenizer: PreTrainedTokenizerBase) -> GPT2Config:
        """GPT-2 of this shape; of characters there is padding, but neither BOS nor EOS."""
        return GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=context,
            activation_function="gelu_pytorch_tanh",  # gelu_new is the same in eight operations
            **{name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd")},
            **dict.fromkeys(DROPOUTS, self.dropout),
            **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id),
            pad_token_id=tokenizer.pad_token_id,
        )


@dataclass
class TwinArguments:
    """How the plain twin's training differs from the regularized model's."""

    plain_warmup_steps: float | None = field(
        default=None, metadata={"help": "Warm-up of the plain model, where it is another."}
    )

    def warmup_steps_of(self, name: str, warmup_steps: float) -> float:
        """Warm-up of the model `plain` or `regularized`, where that of both is `warmup_steps`."""
        own = self.plain_warmup_steps if name == "plain" else None
        return warmup_steps if own is None else own


def one_a_site(name: str, values: list[T], n_sites: int) -> list[T]:
    """A list with one value a site.

    Args:
        name: of the option, for the message.
        values: one for all sites, or one a site.
        n_sites: number of sites.

    Raises:
        HeadConfigError: if there are neither.
    """
    if len(values) == 1:
        return values * n_sites
    if len(values) != n_sites:
        raise HeadConfigError(
            f"{name} has {len(values)} values for {n_sites} sites; give one for all or one a site."
        )
    return values
