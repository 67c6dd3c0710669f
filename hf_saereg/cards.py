"""The card of a published model: facts from its folder, a template, `huggingface_hub`'s metadata.

Notable:
- the templates are `model_cards/*.md.j2`: character model, fine-tuned GPT-2, LoRA adapter
- a card that someone has edited is left as it is: the last line of ours says what it was; what
  `peft` writes into one whenever it saves an adapter is no edit
- `publish` is the one way to the Hub: it checks the folder, makes the card name the repository,
  and uploads
"""

import hashlib
import re
import shutil
from pathlib import Path

import jinja2
from huggingface_hub import CommitInfo, EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_saereg.card_facts import FIGURE_TITLES, RESULTS_FILE, CardFacts, read_facts
from hf_saereg.hub import PushArguments, make_repository, upload
from hf_saereg.layout import (
    CARD,
    FIGURES,
    METADATA,
    PublishingError,
    check_files,
    check_publishable,
)

TAGS = ("sae-regularization", "saelens")
LICENSE = "mit"
BY_PEFT = r"### Framework versions\s+- PEFT \S+\s*"
MARK = re.compile(
    rf"\n<!-- hf-saereg (?P<whole>\w{{12}}) (?P<body>\w{{12}}) -->\n(?P<by_peft>{BY_PEFT})?\Z"
)

SITE_METRICS = {
    "l0": "L0",
    "fvu": "fraction of variance unexplained",
    "dead": "fraction of dead latents",
    "ce_increase": "CE increase",
}


def publish(folder: str | Path, repo: str, arguments: PushArguments | None = None) -> CommitInfo:
    """Publish a checkpoint, its heads and a card that names the repository, in one commit.

    Args:
        folder: what `save_pretrained` or a trainer wrote; only its card may change.
        repo: `user/name`, or `name` in one's own namespace; made if it does not exist.
        arguments: how.

    Returns:
        The commit; as text its address.

    Raises:
        PublishingError: if the folder is no checkpoint, or holds what may not be published; before
            the Hub is asked.
        HubError: if the Hub cannot be reached or refuses.
    """
    folder, arguments = Path(folder), arguments or PushArguments()
    check_publishable(folder, arguments.token)
    _check_license(folder / CARD, arguments.license)
    repo = make_repository(repo, arguments)
    card = write_card(folder, repo, arguments.license)
    check_files(folder, [card.name], arguments.token)
    return upload(folder, repo, arguments)


def _check_license(card: Path, license_name: str | None) -> None:
    if license_name is None or not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    said = ModelCard(text).data.license
    if not is_unedited(text) and said != license_name:
        raise PublishingError(
            f"{card} was edited by hand and says license {said}, not {license_name}; change it "
            "there, or leave out `license`."
        )


def write_card(folder: Path, repo: str | None = None, license_name: str | None = None) -> Path:
    """Write `README.md`, unless there is one that someone has edited.

    Args:
        folder: of a checkpoint.
        repo: what the snippets load, `user/name`; the folder's name by default.
        license_name: of the model, as the Hub abbreviates it; by default that of the card that is
            there, or mit.
    """
    path = folder / CARD
    if path.is_file():
        old = path.read_text(encoding="utf-8")
        if not is_unedited(old):
            return path
        license_name = license_name or ModelCard(old).data.license
    _copy_figures(folder)
    facts = read_facts(folder, repo or folder.absolute().name)
    path.write_text(make_card(facts, license_name or LICENSE), encoding="utf-8")
    return path


def make_card(facts: CardFacts, license_name: str = LICENSE) -> str:
    """The text of a card.

    Args:
        facts: all that it says.
        license_name: of the model.
    """
    data = card_data(facts, license_name)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_templates()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value: "–" if value is None else f"{value:.3g}"
    template = environment.get_template(f"{facts.kind}.md.j2")
    text = template.render(card_data=data.to_yaml(), facts=facts)
    card = ModelCard(re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")
    text = str(card)
    return f"{text}\n<!-- hf-saereg {_digest(text)} {_digest(_body(text))} -->\n"


def is_unedited(text: str) -> bool:
    """Whether a card is as `make_card` made it, or nothing but what `peft` fills in."""
    found = MARK.search(text)
    if found is None:
        template = _body(str(ModelCard.from_template(ModelCardData()))).strip()
        return re.fullmatch(rf"{re.escape(template)}\s*{BY_PEFT}", _body(text).strip()) is not None
    ours = text[: found.start()]
    if found["by_peft"]:  # it changed the metadata, too
        return found["body"] == _digest(_body(ours))
    return found["whole"] == _digest(ours)


def _body(card: str) -> str:
    return METADATA.sub("", card)


def card_data(facts: CardFacts, license_name: str = LICENSE) -> ModelCardData:
    """The metadata of a card, with the figures as evaluation results.

    Args:
        facts: all that it says.
        license_name: of the model.
    """
    results = _eval_results(facts)
    return ModelCardData(
        license=license_name,
        library_name="peft" if facts.kind == "lora" else "transformers",
        pipeline_tag="text-generation",
        base_model=facts.base_model,
        datasets=[facts.dataset] if _is_on_hub(facts.dataset) else None,
        tags=[*TAGS, *sorted({site.family for site in facts.sites})],
        model_name=facts.title,
        eval_results=results or None,
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    shared = {
        "task_type": "text-generation",
        "dataset_type": facts.dataset or "text",
        "dataset_name": f"{facts.dataset or 'text'}, validation part",
        "dataset_split": "validation",
    }
    figures = []
    if "eval_loss" in facts.evaluation:
        figures.append(
            ("cross-entropy", "cross-entropy, nats a token", facts.evaluation["eval_loss"])
        )
    for site in facts.sites:
        figures += [
            (name, f"{label} at {site.hook_name}", getattr(site, name))
            for name, label in SITE_METRICS.items()
        ]
    for row in facts.compound:
        label = f"compound CE increase, {row['source']} {row['family']} {row['sparsity']}"
        figures.append(("compound_ce_increase", label, row["ce_increase"]))
    return [
        EvalResult(metric_type=kind, metric_name=label, metric_value=round(value, 6), **shared)
        for kind, label, value in figures
        if value is not None
    ]


def _is_on_hub(dataset: str | None) -> bool:
    if not dataset or "/" not in dataset:
        return False
    try:
        validate_repo_id(dataset)
    except HFValidationError:
        return False
    return True


def _copy_figures(folder: Path) -> None:
    """From the comparison one folder above, where there is one."""
    above = folder.absolute().parent
    if not (above / RESULTS_FILE).is_file():
        return
    for file in FIGURE_TITLES:
        if (above / FIGURES / file).is_file():
            (folder / FIGURES).mkdir(exist_ok=True)
            shutil.copyfile(above / FIGURES / file, folder / FIGURES / file)


def _templates() -> Path:
    installed = Path(__file__).parent / "model_cards"  # setup.cfg puts it there
    return installed if installed.is_dir() else Path(__file__).parents[1] / "model_cards"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]
