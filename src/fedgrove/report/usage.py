"""How one client's adapter is used: a command, and a few lines with PEFT and Transformers alone."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from fedgrove.ground.names import folder_of
from fedgrove.ground.plain import Plain
from fedgrove.report.data import Run


@dataclass(frozen=True)
class Reader:
    """How Transformers reads what a task is about."""

    asked: str  # an example
    model: str  # class of the base model
    stock: str  # class of the base model with its own head
    processor: str
    lines: tuple[str, ...]  # from the base's name and the model to the output
    acts_on: str = ""  # what a head of ours is given; "" where there is no such head
    imports: tuple[str, ...] = ()
    gives: str = "output.logits"  # of the base with its own head
    options: str = ""  # of the base's ``from_pretrained``
    beside: str = ""  # what the command needs beside what is asked
    tensors: str = "weight and bias act"  # of the head of ours


def _of_a_text(text: str) -> tuple[str, ...]:
    return (
        "reader = AutoTokenizer.from_pretrained(base_name)",
        f'output = model(**reader("{text}", return_tensors="pt"))',
    )


_ASKED = "What is the capital of France?"
_BETWEEN = '--between "Paris." --between "I do not know."'
_WRITING = (
    "reader = AutoTokenizer.from_pretrained(base_name)",
    f'messages = [{{"role": "user", "content": "{_ASKED}"}}]',
    "batch = reader.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
    ")",
    "print(reader.decode(model.generate(**batch, max_new_tokens=48)[0]))",
)

READERS = {
    "classify-text": Reader(
        asked="a text to classify",
        model="AutoModel",
        stock="AutoModelForSequenceClassification",
        processor="AutoTokenizer",
        lines=_of_a_text("a text to classify"),
        acts_on="the mean of the hidden states over the tokens",
    ),
    "labels": Reader(
        asked="a text to label",
        model="AutoModel",
        stock="AutoModelForSequenceClassification",
        processor="AutoTokenizer",
        lines=_of_a_text("a text to label"),
        acts_on="the mean of the hidden states over the tokens",
    ),
    "regression": Reader(
        asked="a text to rate",
        model="AutoModel",
        stock="AutoModelForSequenceClassification",
        processor="AutoTokenizer",
        lines=_of_a_text("a text to rate"),
        acts_on="the mean of the hidden states over the tokens",
    ),
    "tokens": Reader(
        asked="a text with names in it",
        model="AutoModel",
        stock="AutoModelForTokenClassification",
        processor="AutoTokenizer",
        lines=_of_a_text("a text with names in it"),
        acts_on="the hidden state of each token",
    ),
    "spans": Reader(
        asked="How much is taken?",
        model="AutoModel",
        stock="AutoModelForQuestionAnswering",
        processor="AutoTokenizer",
        lines=(
            "reader = AutoTokenizer.from_pretrained(base_name)",
            'text = "Two pills are taken."',
            # PEFT's own forward drops token_type_ids
            'output = model.base_model(**reader("How much is taken?", text, return_tensors="pt"))',
        ),
        acts_on="the hidden state of each token",
        gives="output.start_logits, output.end_logits",
        beside='--context "Two pills are taken."',
    ),
    "classify-images": Reader(
        asked="photo.png",
        model="AutoModel",
        stock="AutoModelForImageClassification",
        processor="AutoImageProcessor",
        lines=(
            'reader = AutoImageProcessor.from_pretrained(base_name, backend="pil")',
            'image = Image.open("photo.png").convert("RGB")',
            'output = model(**reader(images=image, return_tensors="pt"))',
        ),
        acts_on="the mean of the hidden states over all positions",
        imports=("from PIL import Image",),
        # a base in half precision, which Transformers keeps, does not take the processor's pixels
        options=', dtype="float32"',
    ),
    "generate": Reader(
        asked=_ASKED,
        model="AutoModelForCausalLM",
        stock="AutoModelForCausalLM",
        processor="AutoTokenizer",
        lines=_WRITING,
    ),
    "prefer": Reader(
        asked=_ASKED,
        model="AutoModelForCausalLM",
        stock="AutoModelForCausalLM",
        processor="AutoTokenizer",
        lines=_WRITING,
        beside=_BETWEEN,
    ),
    "reward": Reader(
        asked=_ASKED,
        model="AutoModel",
        stock="AutoModelForSequenceClassification",
        processor="AutoTokenizer",
        lines=_of_a_text("a prompt and an answer to it"),
        acts_on="the hidden state of the last token, of encoders on the mean over the tokens",
        beside=_BETWEEN,
        tensors="weight acts",
    ),
}
#: of an encoder-decoder
FROM_ENCODER = Reader(
    asked=_ASKED,
    model="AutoModelForSeq2SeqLM",
    stock="AutoModelForSeq2SeqLM",
    processor="AutoTokenizer",
    lines=(
        "reader = AutoTokenizer.from_pretrained(base_name)",
        f'batch = reader("{_ASKED}", return_tensors="pt")',
        "print(reader.decode(model.generate(**batch, max_new_tokens=48)[0]))",
    ),
)
OTHER = "a row of your data"  # asked of a task that is not in this list


def usage(run: Run) -> list[tuple[str, str]]:
    """(what it does, code) for one client, with paths relative to the run directory."""
    name = next(iter(sorted(run.clients)), next(iter(run.newcomers), "CLIENT"))
    folder = f"adapters/{folder_of(name)}"
    reader = READERS.get(str(run.summary.get("task")))
    if _card(run, folder).get("head") == "seq2seq":
        reader = FROM_ENCODER
    if reader:
        asked = reader.asked
    else:
        asked = OTHER
    command = f'fedgrove predict . --client {shlex.quote(name)} "{asked}"'
    if reader and reader.beside:
        command += f" {reader.beside}"
    found = [("Ask one client’s model something, from a shell:", command)]
    base = _base(run, folder)
    if reader and base:
        stock = bool(reader.acts_on) and run.setting("model", "head") == "stock"
        found.append((_introduction(reader, stock), _code(run, reader, folder, base, stock)))
    return found


def _base(run: Run, folder: str) -> str:
    """The base model that the client's adapter names. "" where it has no plain PEFT adapter: this
    method's model is more than a sum of LoRA terms, or nothing was exported.
    """
    config = run.path / folder / "adapter_config.json"
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError):
        return ""
    return str(base or run.setting("model", "name") or "BASE MODEL")


def _introduction(reader: Reader, stock: bool) -> str:
    alone = "With PEFT and Transformers alone"
    if stock or not reader.acts_on:
        return f"{alone}:"
    return (
        f"{alone}. The classifier is head.safetensors beside the adapter: its "
        f"{reader.tensors} on {reader.acts_on}."
    )


def _code(
    run: Run,
    reader: Reader,
    folder: str,
    base: str,
    stock: bool,
) -> str:
    from fedgrove.interop.models import SHIPPED_MODELS

    if stock:
        kind = reader.stock
    else:
        kind = reader.model
    options = reader.options
    if stock and (outputs := _outputs(run, folder)):
        options += f", num_labels={outputs}"
    name = json.dumps(base, ensure_ascii=False)
    lines = ["from peft import PeftModel", *reader.imports]
    lines.append(f"from transformers import {kind}, {reader.processor}")
    if base in SHIPPED_MODELS:  # under no name of the hub
        lines += ["", "from fedgrove.interop.models import resolve_name"]
        name = f"resolve_name({name})"
    lines += [
        "",
        f"base_name = {name}",
        f"base = {kind}.from_pretrained(base_name{options})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(folder, ensure_ascii=False)}).eval()",
        *reader.lines,
    ]
    if reader.acts_on:
        lines.append(f"print({reader.gives})" if stock else "hidden = output.last_hidden_state")
    return "\n".join(lines)


def _outputs(run: Run, folder: str) -> int:
    """How many numbers the head of an adapter gives: as its card says, else one for each label."""
    from fedgrove.federation.tasks import TASKS

    card = _card(run, folder)
    if card.get("task") not in TASKS.names():
        return len((run.table or {}).get("labels", []))
    return TASKS.find(card["task"]).from_card(card).outputs


def _card(run: Run, folder: str) -> Plain:
    """What an adapter's card says; {} where it cannot be read."""
    try:
        card = json.loads((run.path / folder / "fedgrove.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if isinstance(card, dict):
        return card
    return {}
