"""What regularization costs on paper: FLOPs, bytes and traffic of a model, its heads, and a step.

    python -m benchmarks.scale        # prints the tables of benchmarks/scale.md

Notable:
- a step reads `TOKENS` tokens whatever the number of GPUs, `MICRO` at once on each
- FLOPs are those of `hf_saereg.flops`; seconds follow from speeds and efficiencies that are
  assumed, not measured: no GPU was at hand
- sparse products do few FLOPs and fetch a row of d_in for each: what they cost is the fetching
- memory is the sum of what a step holds, its peak at most; allocators and libraries need more
- what FSDP2 holds whole follows from the groups that accelerate 1.15 makes; a test looks at them
- `benchmarks.scale_check` sets it beside what was measured
"""

from dataclasses import dataclass, replace

from hf_saereg import flops

TOKENS, MICRO = 2**19, 2**13  # of a step, and of one GPU at once
GB = 1e9


@dataclass(frozen=True)
class Language:
    """A language model's shape."""

    name: str
    n_layer: int
    d_in: int
    context: int
    vocabulary: int
    d_mlp: int
    mlp_matrices: int = 2  # 3 with a gate
    tied: bool = True
    positions: bool = True  # a learnt embedding each

    @property
    def block_weights(self) -> int:
        """Of all matrices that a block multiplies by, over all blocks."""
        return flops.block_weights(self.n_layer, self.d_in, self.d_mlp, self.mlp_matrices)

    @property
    def unembedding(self) -> int:
        """Its weights, which are the embedding's too where these are tied."""
        return self.vocabulary * self.d_in

    @property
    def outermost(self) -> int:
        """Weights that FSDP2 holds whole for a step: unembedding and learnt positions."""
        return self.unembedding + self.positions * self.context * self.d_in

    @property
    def parameters(self) -> int:
        """Without biases and layer norms, which are below 0.2 %."""
        untied = 0 if self.tied else self.unembedding
        return self.block_weights + self.outermost + untied

    def forward_flops(self) -> int:
        """A token of a full context."""
        weights = self.block_weights + self.unembedding
        return flops.forward_flops(weights, self.n_layer, self.d_in, self.context)


@dataclass(frozen=True)
class Heads:
    """As many heads on a stream."""

    sites: int
    d_in: int
    d_sae: int
    l0: int
    token_fraction: float = 1.0
    sites_per_step: int | None = None

    @property
    def parameters(self) -> int:
        """Of all heads, without biases."""
        return self.sites * 2 * self.d_in * self.d_sae

    def step_flops(self, sparse: bool) -> float:
        """A token of the text: forward and backward.

        Args:
            sparse: only the encoder's forward product is dense, the rest costs L0 entries.
        """
        a_site = flops.head_flops(self.d_in, self.d_sae, self.l0 if sparse else None)
        return self.share * self.sites * a_site

    def step_bytes(self) -> float:
        """A token of the text: rows in float32 that sparse products fetch."""
        return self.share * self.sites * 5 * self.l0 * self.d_in * 4

    @property
    def share(self) -> float:
        """Of all tokens and sites that a step reads."""
        return (self.sites_per_step or self.sites) / self.sites * self.token_fraction


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind. Efficiencies are assumptions."""

    flops: float = 989e12  # bfloat16, dense
    memory: float = 80 * GB
    efficiency: float = 0.4  # of the language model's products
    heads_efficiency: float = 0.6  # of products without attention and norms between them
    cache: float = 50e6
    cache_bandwidth: float = 3.3e12  # bytes a second, of scattered rows
    bandwidth: float = 2e12
    a_node: int = 8
    in_node: float = 300 * GB  # bytes a second that a GPU gets from and gives to its neighbours
    between_nodes: float = 40 * GB


@dataclass(frozen=True)
class Step:
    """One optimizer step on some GPUs.

    Attributes:
        shard: FSDP2 as recipes/accelerate/fsdp2.yaml has it: blocks gathered one at a time; the
            unembedding and its norm (one group), and all heads and learnt positions (the root)
            whole from the forward pass to the end of the backward one; else DDP.
        shard_heads: each head a group of its own, which no recipe can do yet.
        sparse: how the heads are computed.
        checkpointing: blocks are computed again in the backward pass.
        sync_each_batch: gradients of shards are scattered after every micro-batch (accelerate's
            `gradient_accumulation_kwargs`); otherwise all stay whole until the last.
        reference: a copy of the language model, whole on each GPU in float32, as `eval_base` and
            `anchor_weight` keep it outside `mode: lora` (hf_saereg/reference.py).
    """

    language: Language
    heads: Heads | None
    gpus: int
    shard: bool = False
    shard_heads: bool = False
    sparse: bool = True
    checkpointing: bool = False
    sync_each_batch: bool = True
    reference: bool = False
    micro: int = MICRO
    machine: Machine = Machine()

    @property
    def parameters(self) -> int:
        """Of model and heads."""
        return self.language.parameters + (self.heads.parameters if self.heads else 0)

    def compute_seconds(self) -> float:
        """Of computing alone, on each GPU."""
        passes, machine = flops.PASSES + self.checkpointing, self.machine
        a_token = passes * self.language.forward_flops() / machine.efficiency / machine.flops
        if self.heads is not None:
            of_heads = self.heads.step_flops(self.sparse)
            a_token += of_heads / machine.heads_efficiency / machine.flops
            if self.sparse:
                cached = 4 * self.heads.d_in * self.heads.d_sae <= machine.cache
                speed = machine.cache_bandwidth if cached else machine.bandwidth
                a_token += self.heads.step_bytes() / speed
        return TOKENS / self.gpus * a_token

    def traffic(self) -> float:
        """Bytes that each GPU sends in a step."""
        others = (self.gpus - 1) / self.gpus
        if not self.shard:
            return 2 * others * 4 * self.parameters  # all-reduce of float32 gradients
        # for every micro-batch weights are gathered in bfloat16: twice, unless they stay whole
        whole = self.language.outermost
        if self.heads is not None and not self.shard_heads:
            whole += self.heads.parameters
        gathered = self.micro_batches * 2 * (2 * self.parameters - whole)
        scattered = self.micro_batches if self.sync_each_batch else 1
        return others * (gathered + scattered * 4 * self.parameters)

    @property
    def micro_batches(self) -> int:
        """Of a step, on each GPU."""
        return max(1, TOKENS // (self.micro * self.gpus))

    def traffic_seconds(self) -> float:
        """Of the traffic, were it not hidden behind the backward pass."""
        within = self.gpus <= self.machine.a_node
        speed = self.machine.in_node if within else self.machine.between_nodes
        return self.traffic() / speed

    def memory(self) -> dict[str, float]:
        """Bytes on each GPU, by what they are for."""
        share = 1 / self.gpus if self.shard else 1
        language, heads = self.language, self.heads
        stream = 2 if self.shard else 4  # FSDP2 casts weights, and so stream and gradients
        kept = 34 * language.d_in  # of a token in a block, bfloat16, attention not materialised
        if self.checkpointing:
            kept = stream * language.d_in + kept / language.n_layer
        used = {
            "states": 16 * share * self.parameters,  # weights, gradients, two of Adam, float32
            "activations": self.micro * language.n_layer * kept,
            "logits": self.micro * language.vocabulary * 10,  # bfloat16, float32 and its gradient
        }
        if not self.shard and self.gpus > 1:
            used["buckets"] = 4 * self.parameters  # DDP's, of gradients on their way
        if self.shard:
            # weights and gradients in bfloat16, and the latter once more in float32 to be scattered
            block = language.block_weights // language.n_layer
            used["gathered"] = (2 + 2 + 4) * (language.outermost + block)
        if self.shard and self.micro_batches > 1 and not self.sync_each_batch:
            used["whole gradients"] = 4 * self.parameters
        if self.reference:
            used["reference"] = 4 * language.parameters
        if heads is not None:
            # the term's gradients wait for the backward pass: see hf_saereg.eager_gradients
            waiting, whole = stream * heads.parameters, 0
            if self.shard:
                whole = (2 + 4) * heads.parameters  # as above; their gradients are those that wait
            if self.shard_heads:
                waiting, whole = waiting / self.gpus, whole / heads.sites
            of_own_tokens = stream * self.micro * heads.sites * heads.d_in  # never shared out
            used["heads"] = waiting + whole + of_own_tokens
        return used

    def seconds(self) -> float:
        """Half of the traffic hidden behind the products of the backward pass, at most."""
        compute, traffic = self.compute_seconds(), self.traffic_seconds()
        return compute + max(0.0, traffic - compute / 2)


LANGUAGES = (
    Language("GPT-2 small", 12, 768, 1024, 50257, 3072),
    Language("GPT-2 medium", 24, 1024, 1024, 50257, 4096),
    Language("GPT-2 XL", 48, 1600, 1024, 50257, 6400),
    Language("7 B, 32 sites", 32, 4096, 4096, 32000, 11008, 3, tied=False, positions=False),
)
GPUS = (1, 8, 64)


def heads_of(language: Language) -> Heads:
    """TopK heads of eight times the width on every site; on a 7 B model before every block."""
    sites = 32 if language.n_layer == 32 else language.n_layer + 1
    return Heads(sites, language.d_in, 8 * language.d_in, l0=32)


def step_of(language: Language, gpus: int) -> Step:
    """DDP without checkpointing if it fits; else what makes it fit, one thing after another.

    A single GPU has nobody to share with.
    """
    ways: list[dict[str, bool]] = [
        {},
        {"checkpointing": True},
        {"checkpointing": True, "shard": True},
        {"checkpointing": True, "shard": True, "shard_heads": True},
    ]
    possible = ways if gpus > 1 else ways[:2]
    steps = [Step(language, heads_of(language), gpus, **way) for way in possible]
    return next((step for step in steps if fits(step)), steps[-1])


def fits(step: Step) -> bool:
    """Whether a tenth of the memory stays free."""
    return sum(step.memory().values()) < 0.9 * step.machine.memory


def switched_on(step: Step) -> str:
    """What of `step_of`'s ways a step takes, in words."""
    names = {
        "checkpointing": "checkpointing",
        "shard": "FSDP2",
        "shard_heads": "sharded heads (not yet)",
    }
    alone = "no switch" if step.gpus == 1 else "DDP"
    found = [word for name, word in names.items() if getattr(step, name)] or [alone]
    return ", ".join(found) + ("" if fits(step) else ": does not fit")


def model_table() -> list[str]:
    """Parameters, and FLOPs a token, of models and heads."""
    lines = [
        "| model | parameters | of its heads | GFLOP a token, plain | heads dense | sparse |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for language in LANGUAGES:
        heads = heads_of(language)
        plain = flops.PASSES * language.forward_flops()
        dense, sparse = (heads.step_flops(sparse=sparse) for sparse in (False, True))
        lines.append(
            f"| {language.name} | {language.parameters / 1e6:,.0f} M | "
            f"{heads.parameters / 1e6:,.0f} M | {plain / 1e9:.2f} | +{dense / plain:.0%} | "
            f"+{sparse / plain:.0%} |"
        )
    return lines


def step_table() -> list[str]:
    """Seconds and memory of a step, by model and number of GPUs."""
    lines = [
        "| model | GPUs | how | GB a GPU | with the base's copy | plain, s | heads dense | "
        "sparse | ¼ of tokens | traffic, GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for language in LANGUAGES:
        for gpus in GPUS:
            step = step_of(language, gpus)
            copied = replace(step, reference=True)
            stops = "" if fits(copied) or not fits(step) else ": does not fit"
            plain = replace(step, heads=None).seconds()
            quarter = replace(step.heads, token_fraction=0.25)
            ways = [replace(step, sparse=False), step]
            ways.append(replace(step, heads=quarter, sparse=False))
            ratios = " | ".join(f"× {way.seconds() / plain:.2f}" for way in ways)
            lines.append(
                f"| {language.name} | {gpus} | {switched_on(step)} | "
                f"{sum(step.memory().values()) / GB:.0f} | "
                f"{sum(copied.memory().values()) / GB:.0f}{stops} | {plain:.2f} | {ratios} | "
                f"{step.traffic() / GB:.1f} |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join([*model_table(), "", *step_table()]))
