"""Every architecture of docs/models.md as a tiny random checkpoint: it trains, and PEFT reloads what
leaves to the same logits, alone or in a cohort, packed or padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.interop import zoo
from tests.tiny import exchanges, sentences, unclipped
from torch import Tensor

from fedgrove.adapters import Assembly, Extra, Term, fresh
from fedgrove.adapters.assembly import as_one_adapter
from fedgrove.federation.tasks import ClassifyText, Generate, Task
from fedgrove.federation.tasks.seq2seq import as_read
from fedgrove.ground.errors import FedgroveError
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import Base, load_base, model_class
from fedgrove.interop.peft import save_adapter
from fedgrove.methods.contract import Step
from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.loop import Clock
from fedgrove.training.readers import FromEncoder

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NEAR = 1e-4  # many models compute norms in float32 whatever they are in


@dataclass(frozen=True)
class Row:
    """What the page says of an architecture."""

    kind: str
    adapted: str
    classes: str
    text: str
    packed: str

    @property
    def works(self) -> bool:
        return "yes" in (self.classes, self.text)


@cache
def rows() -> dict[str, Row]:
    """The table of the page, by model_type."""
    found: dict[str, Row] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`"):
            row = Row(cells[0].strip("`"), *cells[1:])
            found[row.kind] = row
    return found


def works_of(base: Base, task: Task[Any], given: list[list[dict[str, Any]]]) -> list[Work]:
    """Two steps of two clients."""
    found = []
    for number, own in enumerate(given):
        head = task.new_head(base.hidden, generator(number, "head"))
        extras = {f"head.{name}": Extra(value.double()) for name, value in head.items()}
        adapter = fresh(base.sites, 2, 0.7, generator(number, "A"), dtype=torch.float64)
        step = Step(Assembly((Term("own", adapter, train="AB"),), extras=extras))
        found.append(Work(step, task.encode(own, base.processor), Clock(number, ("t",))))
    return found


def check(base: Base, task: Task[Any], given: list[list[dict[str, Any]]], folder: Path) -> bool:
    """Train, export, reload and compare; whether batches are packed."""
    kernel = Kernel(base, task, unclipped(batch_size=3, local_steps=2, lr=1e-2))
    packs = kernel.hooked.packs
    works = works_of(base, task, given)
    alone = [kernel.work(work) for work in works]
    if all(map(kernel.joins, works)):
        for one, other in zip(alone, kernel.train_together(works), strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-4)
    trained = alone[0].assembly
    adapter = as_one_adapter(trained, base.sites)
    assert all(factors.B.abs().max() > 0 for factors in adapter.values()), "a site did not train"
    save_adapter(
        folder,
        adapter,
        base="tiny",
        head={},
        head_kind=base.head,
        transposed=any(site.transposed for site in base.sites.values()),
        card={"task": task.name},
    )
    ours, batch = read(kernel, trained, works[0].examples)
    kernel.hooked.packs = False
    padded, _ = read(kernel, trained, works[0].examples)
    assert torch.allclose(ours, padded, rtol=NEAR, atol=NEAR)
    kernel.close()
    theirs = reloaded(base, folder)
    inputs = task.inputs(batch)
    if isinstance(kernel.reader, FromEncoder):
        asked = task.positions(batch)  # type: ignore[attr-defined]
        inputs["decoder_input_ids"] = kernel.reader.language.before(batch["labels"], asked)
    with torch.no_grad():
        output = theirs(**inputs)
    if isinstance(task, Generate):
        expected = output.logits[task.positions(batch)]
    else:
        weight, bias = trained.extras["head.weight"].value, trained.extras["head.bias"].value
        expected = task.pool(output.last_hidden_state, batch) @ weight.T + bias
    assert torch.allclose(ours, expected.double(), rtol=NEAR, atol=NEAR)
    return packs


def read(kernel: Kernel, assembly: Assembly, examples: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [n, c] of one batch of examples, and the batch."""
    with torch.no_grad(), kernel.opened(assembly, train=False) as live:
        ((_, batch),) = [
            (kernel.reader.logits(live.head, batch), batch)
            for _, batch in kernel.passes(live, examples)
        ]
        (logits,) = [
            kernel.reader.logits(live.head, again) for _, again in kernel.passes(live, examples)
        ]
    return logits.double(), batch


def reloaded(base: Base, folder: Path) -> Any:
    factory = model_class("generate", base.head)
    plain = factory.from_pretrained(base.name, dtype=base.dtype)
    return PeftModel.from_pretrained(plain, str(folder)).eval()


def outcome(kind: str, folder: Path) -> Row:
    """The page's row of an architecture, found out."""
    task = ClassifyText(("negative", "positive"), max_length=16)
    texts = [sentences(7, seed=0), sentences(8, seed=1)]
    dtype = torch.float32 if kind in zoo.SINGLE else torch.float64
    if kind in zoo.BOTH:
        packs, base = writes(kind, folder, dtype)
        return Row(kind, adapted(base), "–", "yes", "yes" if packs else "no")
    try:
        base = load_base(str(zoo.save(kind, folder / "encoder")), dtype=dtype)
        packs = check(base, task, texts, folder / "adapter")
    except FedgroveError as error:
        return Row(kind, "", f"no: {error}", "", "")
    text = "–"
    if kind in zoo.DECODERS:
        written, _ = writes(kind, folder, dtype)
        packs &= written
        text = "yes"
    return Row(kind, adapted(base), "yes", text, "yes" if packs else "no")


def writes(kind: str, folder: Path, dtype: torch.dtype) -> tuple[bool, Base]:
    """Whether texts are learnt from packed batches, and the base."""
    saved = zoo.save(kind, folder / "writer", writes=True)
    base = load_base(str(saved), task="generate", head="lm", dtype=dtype)
    task = as_read(Generate(max_length=32, max_new_tokens=3, generate_examples=2), base.head)
    return check(base, task, [exchanges(7, seed=0), exchanges(8, seed=1)], folder / "lm"), base


def adapted(base: Base) -> str:
    """What the adapted layers are called."""
    return ", ".join(f"`{end}`" for end in sorted({s.rsplit(".", 1)[-1] for s in base.sites}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", zoo.ALL)
def test_the_page_says_what_holds(kind: str, tmp_path: Path) -> None:
    known = rows()[kind]
    if not known.works:
        with pytest.raises(FedgroveError):
            load_base(str(zoo.save(kind, tmp_path / "encoder")))
        return
    assert outcome(kind, tmp_path) == known


def test_the_page_has_every_architecture() -> None:
    assert list(rows()) == sorted(zoo.ALL)
    assert sum(row.works for row in rows().values()) >= 30
