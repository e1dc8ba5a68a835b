"""The job: what it accepts, what it says of everything else, and that no way of writing it loses
anything.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedgrove.ground.errors import JobError
from fedgrove.job import Job

pytestmark = pytest.mark.usefixtures("few_methods")

# Text of a job, and what its error must say. Every sentence names the key, the value and what would
# be right.
MISTAKES = [
    ("[lora]\nrank = 0", "lora.rank must be an integer of at least 1, not 0."),
    ("[lora]\nrank = '8'", 'lora.rank must be an integer of at least 1, not "8".'),
    ("[lora]\nrank = 8.0", "lora.rank must be an integer of at least 1, not 8.0."),
    ("[lora]\ndropout = 1", "lora.dropout must be a number of at least 0 and below 1, not 1."),
    (
        "[lora]\ntargets = 'query'",
        'lora.targets must be "auto", "all-linear" or a list of 1 or more (each text), not "query".',
    ),
    ("[train]\nlr = true", "train.lr must be a number above 0, not true."),
    ("[train]\nlr = nan", "train.lr must be a number above 0, not nan."),
    ("[train]\nlr = inf", "train.lr must be a number above 0, not inf."),
    ("[train]\nlr = -inf", "train.lr must be a number above 0, not -inf."),
    (
        "[train]\noptimizer = 'adam'",
        'train.optimizer must be "adamw" or "sgd", not "adam"; did you mean "adamw"?',
    ),
    ("[train]\nthreads = 0", 'train.threads must be "auto" or an integer of at least 1, not 0.'),
    (
        "[train]\nlocal_steps = 3\nlocal_epochs = 2",
        "train.local_steps = 3 and train.local_epochs = 2 are both set; ",
    ),
    ("[train]\nmomentum = 0.9", 'train.momentum = 0.9 has no use with train.optimizer = "adamw"; '),
    ("[model]\nrevision = 3", 'model.revision must be text, not 3; write it in quotes: "3".'),
    ("[model]\nrevision = 'main'", 'model.revision = "main" has no use with the embedded model; '),
    ("[model]\nname = ''", 'model.name must be text, not "".'),
    ("model = 3", "model must be a section, [model] with its keys below it, not 3."),
    (
        "[[train]]\nlr = 1.0",
        "train must be a section, [train] with its keys below it, not [{ lr = 1.0 }].",
    ),
    (
        "[data]\npartition = 'iid'",
        "data.partition must be a section, [data.partition] with its keys below it, ",
    ),
    (
        "[data]\nsource = 'silo'",
        'data.source must be "embedded", "hub", "made", "silos" or "table", not "silo"; did you mean "s',
    ),
    (
        "[data]\nsource = 'silos'",
        'data.path is missing: with data.source = "silos" it must name the folder ',
    ),
    (
        "[data]\nsource = 'table'",
        'data.path is missing: with data.source = "table" it must name the table',
    ),
    (
        "[data]\nsource = 'hub'",
        'data.name is missing: with data.source = "hub" it must name a data set of the hub',
    ),
    (
        "[data]\npath = 'mine'",
        'data.path = "mine" has no use with data.source = "embedded"; set data.source to "silos"',
    ),
    (
        "[data]\nconfig = 'a'",
        'data.config = "a" has no use with data.source = "embedded"; set data.source to "hub", or',
    ),
    (
        "[data]\nprompt = 'ask'",
        'data.prompt = "ask" has no use with data.task = "classify-text"; set data.task to "generate"',
    ),
    (
        "[data]\ntask = 'generat'",
        'data.task must be "auto", "classify-images", "classify-text", "generate", "labels", "prefer", "regression", '
        '"reward", "spans" or "tokens"',
    ),
    (
        "[data]\nmetrics = ['f1_marco']",
        'each of data.metrics must be "auroc", "balanced_accuracy", "ece", "entity_f1", "entity_f1_by_type"',
    ),
    (
        "[data]\nmetrics = ['rouge_1']",
        '"rouge_1" needs outputs and references, which the task "classify-text" does not give',
    ),
    (
        "[data]\nsource='silos'\npath='x'\nname='y'",
        'data.name = "y" has no use with data.source = "silos"; set data.source to "embedded" or "hub"',
    ),
    (
        "[data]\nsource='silos'\npath='x'\npartition.by='iid'",
        'data.partition.by = "iid" has no use with silos',
    ),
    (
        "[data]\ntest_fraction = 0.5\nvalidation_fraction = 0.5",
        "leave nothing to train on; their sum must be below 1.",
    ),
    ("[data]\nlabels = ['a']", 'data.labels must be a list of 2 or more (each text), not ["a"].'),
    (
        "[data]\nlabels = ['a', 'b', 'a']",
        'data.labels = ["a", "b", "a"] names "a" twice; name each once.',
    ),
    (
        "[federation]\nfraction = 0",
        "federation.fraction must be a number above 0 and at most 1, not 0.",
    ),
    (
        "[federation]\nranks = [4, 0]",
        "federation.ranks must be a list (each an integer of at least 1) or a table (each",
    ),
    ("[federation]\nranks = { a = 'x' }", 'integer of at least 1), not { a = "x" }.'),
    (
        "[federation]\nheld_out = 4",
        "federation.held_out must be a number of at least 0 and below 1 or a list of 1 or ",
    ),
    (
        "[federation]\nheld_out = ['a', 'a']",
        'federation.held_out = ["a", "a"] names "a" twice; name each once.',
    ),
    (
        "[federation]\nnewcomer_head = 'yes'",
        'federation.newcomer_head must be "auto", true or false, not "yes".',
    ),
    (
        "[federation]\nranks = [4, 8]\n[lora]\nrank = 4",
        "federation.ranks = [4, 8]: the rank 8 is above lora.rank = 4; ",
    ),
    (
        "[federation]\nranks = {a = 8}\n[lora]\nrank = 4",
        'the rank 8 of the client "a" is above lora.rank = 4; ',
    ),
    ("[run]\nrounds = 0", "run.rounds must be an integer of at least 1, not 0."),
    (
        "[run]\nout = 'runs/{methd}'",
        'run.out = "runs/{methd}": {methd} stands for nothing; only {method} and {seed} do.',
    ),
    (
        "[method]\nname = 'fedtreelor'",
        'method.name = "fedtreelor" is no method; did you mean "fedtreelora"? There are',
    ),
    (
        "[method]\nname = 'zzz'",
        'method.name = "zzz" is no method; there are fedit, fedtreelora and local.',
    ),
    ("[method]\nname = 3\nK = 0", 'method.name must be text, not 3; write it in quotes: "3".'),
    ("[method]\nname = 'fedtreelora'\nK = 0", "method.K must be an integer of at least 1, not 0."),
    ("[method]\nweights = 'even'", 'method.weights must be "examples" or "uniform", not "even".'),
    # unknown names, with the nearest known one
    ("[trian]\nlr = 1.0", "the section [trian] is unknown; did you mean [train]?"),
    (
        "[zzz]\nlr = 1.0",
        "the section [zzz] is unknown; the sections are [model], [lora], [data], [federation], "
        "[method]",
    ),
    ("[lora]\nuse_rslora = true", "the key lora.use_rslora is unknown; did you mean lora.rslora?"),
    ("[lora]\nuse_dora = true", "the key lora.use_dora is unknown; did you mean lora.dora?"),
    (
        "[model]\nresume_from_adapter = 1",
        "the key model.resume_from_adapter is unknown; did you mean model.adapter?",
    ),
    (
        "[train]\nearly_stopping_patience = 3",
        "the key train.early_stopping_patience is unknown; did you mean run.patience?",
    ),
    ("[run]\nround = 3", "the key run.round is unknown; did you mean run.rounds?"),
    ("[train]\nrounds = 3", "the key train.rounds is unknown; did you mean run.rounds?"),
    ("rounds = 3", "the key rounds is unknown; did you mean run.rounds?"),
    (
        "[train]\nlearning_rate = 1e-3",
        "the key train.learning_rate is unknown; did you mean train.lr?",
    ),
    (
        "[train]\nleanring_rate = 1e-3",
        "the key train.leanring_rate is unknown; did you mean train.lr?",
    ),
    (
        "[lora]\ntarget_modules = ['query']",
        "the key lora.target_modules is unknown; did you mean lora.targets?",
    ),
    (
        "[data.partition]\nbyy = 'iid'",
        "the key data.partition.byy is unknown; did you mean data.partition.by?",
    ),
    (
        "[method]\nwieghts = 'uniform'",
        "the key method.wieghts is unknown; did you mean method.weights?",
    ),
    (
        "[method]\nname = 'fedtreelora'\nk_max = 3",
        "is unknown; the keys of [method] are name, uniform_rank, K, tau",
    ),
    (
        "[method]\nuniform = 'min'",
        "the key method.uniform is unknown; did you mean method.uniform_rank?",
    ),
    (
        "[run]\n'a b' = 3",
        'the key run."a b" is unknown; the keys of [run] are rounds, seed, out, eval_every',
    ),
    # broken TOML
    (
        "[train]\nlr = fast",
        ", line 2, column 6: broken TOML (invalid value; text needs quotes) in: lr = fast",
    ),
    ("[train]\nlr = ", ", line 2, column 6: broken TOML (invalid value) in: lr ="),
    (
        "[train",
        ", line 1, column 7: broken TOML (expected ']' at the end of a table declaration) in: "
        "[train",
    ),
    (
        "[train]\nlr = 1.0\nlr = 2.0",
        ", line 3, column 9: broken TOML (cannot overwrite a value) in: lr = 2.0",
    ),
    ('[data]\npath = """x', ", line 2, column 12: broken TOML (unterminated string) in: path ="),
    ("x = " + "[" * 5000, "the TOML is nested too deeply"),
]


@pytest.mark.parametrize(
    ("content", "sentence"),
    MISTAKES,
    ids=[content.replace("\n", " ")[:50] for content, _ in MISTAKES],
)
def test_mistake_is_one_clear_sentence(content: str, sentence: str) -> None:
    with pytest.raises(JobError) as caught:
        Job.parse(content, where="mine.toml")
    message = str(caught.value)
    assert sentence in message
    assert message.startswith("mine.toml")
    assert "\n" not in message
    assert "pydantic" not in message
    assert "None" not in message


def test_several_mistakes_are_listed_in_full_up_to_a_few() -> None:
    with pytest.raises(JobError) as caught:
        Job.parse(
            "[method]\nname = 'fedtreelora'\nK = 0\ntau = 'x'\n[run]\nsed = 1\n[model]\nhead = "
            "'big'"
        )
    first, *rest = str(caught.value).splitlines()
    assert first == "job.toml: the job has 4 mistakes:"
    assert sorted(line.strip().split(" must ")[0].split(" is ")[0] for line in rest) == [
        "method.K",
        "method.tau",
        "model.head",
        "the key run.sed",
    ]
    with pytest.raises(JobError, match=r"the job has 9 mistakes:(\n.*){5}\n  ... and 4 more.$"):
        Job.parse("[run]\n" + "\n".join(f"key{i} = 1" for i in range(9)))


# ------------------------------------------------------------ files


def test_load_names_the_file(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(JobError, match=r"There is no job file .*none\.toml; `fedgrove init"):
        Job.load(missing)
    with pytest.raises(JobError, match="is a directory; name the job file in it"):
        Job.load(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"[run]\nout = '\xff'\n")
    with pytest.raises(JobError, match=r"binary\.toml is no text in UTF-8 \(byte 13\)"):
        Job.load(binary)
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[run]\nrounds = 0\n")
    with pytest.raises(JobError, match=rf"^{re.escape(str(wrong))}: run\.rounds must be"):
        Job.load(wrong)


def test_load_takes_the_mark_that_windows_editors_put_first(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xef\xbb\xbf[run]\r\nrounds = 3\r\n")
    assert Job.load(path).run.rounds == 3


def test_short_forms() -> None:
    assert Job.parse('model = "roberta-large"') == Job.parse('[model]\nname = "roberta-large"')
    assert Job.parse('method = "local"').method.name == "local"


def test_epochs_alone_replace_the_default_steps() -> None:
    train = Job.parse("[train]\nlocal_epochs = 2").train
    assert (train.local_epochs, train.local_steps) == (2, None)


def test_an_empty_group_is_no_group() -> None:
    assert Job.parse("[data]\ngroup = ''").data.group is None


def test_a_job_cannot_be_changed() -> None:
    job = Job()
    with pytest.raises(ValidationError):
        job.run.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        job.run = job.run  # type: ignore[misc]


# ------------------------------------------------------------ round trip

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
PLAIN = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
POSITIVE = st.integers(min_value=1, max_value=10**12)
SMALL = st.floats(min_value=0, max_value=0.4)
LEARNING_RATE = st.floats(min_value=1e-300, max_value=1e300)
KEYS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {
        "name": TEXT.filter(lambda name: name != "minilm"),
        "head": st.sampled_from(["pooled", "stock"]),
    },
    "lora": {
        "alpha": LEARNING_RATE,
        "dropout": SMALL,
        "targets": st.lists(TEXT, min_size=1, max_size=3),
    },
    "data": {
        "text": TEXT,
        "group": TEXT,
        "labels": st.lists(TEXT, min_size=2, max_size=4, unique=True),
        "validation_fraction": SMALL,
        "train_examples": POSITIVE,
        "partition": st.fixed_dictionaries(
            {}, optional={"by": TEXT, "options": st.dictionaries(TEXT, PLAIN, max_size=3)}
        ),
    },
    "federation": {
        "ranks": st.lists(POSITIVE, max_size=4) | st.dictionaries(TEXT, POSITIVE, max_size=3),
        "held_out": SMALL | st.lists(TEXT, min_size=1, max_size=3, unique=True),
        "newcomer_head": st.booleans() | st.just("auto"),
    },
    "method": {
        "name": st.just("fedtreelora"),
        "K": POSITIVE,
        "tau": st.floats(-1, 1),
        "warmup_rounds": POSITIVE,
    },
    "train": {
        "lr": LEARNING_RATE,
        "local_epochs": POSITIVE,
        "threads": POSITIVE | st.just("auto"),
        "clip": SMALL,
    },
    "run": {
        "seed": POSITIVE,
        "noise": st.booleans(),
        "out": TEXT.filter(lambda out: "{" not in out),
    },
}
JOBS = st.fixed_dictionaries(
    {
        name: st.fixed_dictionaries(
            {"name": keys["name"]}, optional={k: v for k, v in keys.items() if k != "name"}
        )
        if name == "method"
        else st.fixed_dictionaries({}, optional=keys)
        for name, keys in KEYS.items()
    }
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(JOBS)
def test_a_job_survives_being_written(values: dict[str, Any]) -> None:
    job = Job.build(values)
    written = job.to_toml()
    assert Job.parse(written) == job
    assert Job.parse(written).to_toml() == written
    assert Job.parse(written).digest() == job.digest()
    assert Job.build(job.to_dict()) == job
    for section, keys in values.items():
        given_back = tomllib.loads(written)[section]
        for key in keys.keys() - {"partition"}:
            assert given_back.get(key) == (keys[key] or None if key == "group" else keys[key])


def test_written_order_is_fixed_and_complete() -> None:
    written = Job.parse("[run]\nseed = 3\n[model]\nhead = 'stock'").to_toml()
    assert re.findall(r"^\[(.*)\]$", written, re.MULTILINE) == [
        "model",
        "lora",
        "data",
        "data.partition",
        "federation",
        "method",
        "train",
        "privacy",
        "defence",
        "attack",
        "run",
    ]
    assert tomllib.loads(written)["train"]["lr"] == 1e-3  # defaults are written out too


def test_default_job_is_the_embedded_federation() -> None:
    job = Job.default()
    assert (job.model.name, job.data.name, job.data.group, job.data.train_examples) == (
        "minilm",
        "sentiment",
        "domain",
        60,
    )
    assert (job.federation.clients, job.method.name) == (16, "fedit")
    assert (job.data.partition.by, job.data.partition.options) == ("dirichlet", {"alpha": 2.0})


# ------------------------------------------------------------ explain, template


def keys_of(job: Job) -> set[str]:
    found = set()
    for name in type(job).model_fields:
        section = getattr(job, name)
        found |= {f"{name}.{key}" for key in type(section).offered()}
    found -= {"data.partition", "method.options"}
    found |= {f"data.partition.{key}" for key in type(job.data.partition).model_fields}
    return found | {f"method.{key}" for key in type(job.method.options).model_fields}


def test_explain_has_every_key_with_type_default_and_description() -> None:
    job = Job.parse("[method]\nname = 'fedtreelora'\nK = 5")
    text = job.explain()
    blocks = {
        block.split(":")[0].strip(): block
        for block in text.split("\n\n")
        if not block.startswith("[")
    }
    assert set(blocks) == keys_of(job)
    for key in blocks:
        head, description = re.split(r"\n {6}", blocks[key], maxsplit=1)
        assert "default:" in head
        assert len(description.strip()) > 10
    assert "method.K: an integer of at least 1; default: 3; here: 5" in text
    assert "train.local_epochs: an integer of at least 1; default: not set" in text


def test_template_is_the_default_job_and_every_comment_in_it_works() -> None:
    template = Job.template()
    assert Job.parse(template) == Job.default()
    section, offered = "", set()
    others = {f"data.{key}" for key in type(Job.default().data).others()}
    for line in template.splitlines():
        if header := re.fullmatch(r"\[(.+)\]", line):
            section = header[1]
        elif setting := re.fullmatch(r"(?:# )?(\w+) = (.+)", line):
            key = f"{section}.{setting[1]}"
            offered.add(key)
            if key == "model.revision" or key in others:  # need another choice beside them
                tomllib.loads(line.removeprefix("# "))
            elif line.startswith("# "):
                Job.default().override([f"{key}={setting[2]}"])
    assert offered == keys_of(Job.default())
    assert max(map(len, template.splitlines())) <= 120


# ------------------------------------------------------------ override


@pytest.mark.parametrize(
    ("setting", "section", "key", "value"),
    [
        ("train.lr=5e-4", "train", "lr", 5e-4),
        ("train.lr = 1", "train", "lr", 1.0),
        ("train.gradient_checkpointing=true", "train", "gradient_checkpointing", True),
        ("train.optimizer=sgd", "train", "optimizer", "sgd"),
        ('train.optimizer="sgd"', "train", "optimizer", "sgd"),
        ("lora.targets=[query, *.dense]", "lora", "targets", ("query", "*.dense")),
        ('lora.targets=["a, b"]', "lora", "targets", ("a, b",)),
        ("federation.ranks=[4,8]", "federation", "ranks", (4, 8)),
        ("federation.ranks={a=4}", "federation", "ranks", {"a": 4}),
        ("federation.ranks.tweets-0=4", "federation", "ranks", {"tweets-0": 4}),
        ('federation.ranks."clinic.3"=4', "federation", "ranks", {"clinic.3": 4}),
        ("federation.held_out=[tweets-0]", "federation", "held_out", ("tweets-0",)),
        ("model=roberta-large", "model", "name", "roberta-large"),
        ("data.text=a=b", "data", "text", "a=b"),
        ("data.text=2024-01-01", "data", "text", "2024-01-01"),
        ("run.out=x y", "run", "out", "x y"),
    ],
)
def test_override(setting: str, section: str, key: str, value: object) -> None:
    before = Job.default()
    after = before.override([setting])
    changed = getattr(getattr(after, section), key)
    assert changed == value
    assert type(changed) is type(value)
    assert Job.default() == before != after
    assert after.replace(**{section: {key: getattr(getattr(before, section), key)}}) == before


def test_override_reaches_nested_tables_and_method_options() -> None:
    job = Job.default().override(["data.partition.options.alpha=0.3", "method.weights=uniform"])
    assert job.data.partition.options == {"alpha": 0.3}
    assert job.method.options.weights == "uniform"


def test_override_the_last_one_wins_and_an_empty_one_resets() -> None:
    job = Job().override(["train.lr=1", "lora.rank=4", "train.lr=2"])
    assert (job.train.lr, job.lora.rank) == (2.0, 4)
    back = job.override(["train.lr=", "lora.rank="])
    assert back == Job()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "train.lr",
            "'train.lr' is no setting; write section.key=value, for example train.lr=1e-3.",
        ),
        ("=3", "'=3' is no setting; "),
        ("train..lr=3", "'train..lr=3' is no setting; "),
        ("lr=3", "the key lr is unknown; did you mean train.lr?"),
        ("train.lrr=3", "the key train.lrr is unknown; did you mean train.lr?"),
        ("trian.lr=3", "the section [trian] is unknown; did you mean [train]?"),
        ("train.lr.x=3", "train.lr must be a number above 0, not { x = 3 }."),
        ("train.lr=fast", 'train.lr must be a number above 0, not "fast".'),
        ("train.lr=1\ntrain.x=2", 'train.lr must be a number above 0, not "1\\ntrain.x=2".'),
        ("method.name=hilora", 'method.name = "hilora" is no method; '),
        (
            "method.tau=0.3",
            "the key method.tau is unknown; the keys of [method] are name, uniform_rank and "
            "weights.",
        ),
        ("run.out=\udcff", "run.out must be text"),
    ],
)
def test_override_mistakes(setting: str, sentence: str) -> None:
    with pytest.raises(JobError, match=re.escape(sentence)):
        Job.default().override([setting])


def test_another_choice_drops_the_keys_of_the_old_one() -> None:
    tree = Job.default().override(
        ["method.name=fedtreelora", "method.tau=0.3", "method.uniform_rank=min"]
    )
    assert tree.method.options.tau == 0.3
    assert (
        tree.override(["method.name=fedtreelora", "method.K=5"]).method.options.tau == 0.3
    )  # the same choice keeps
    fedit = tree.override(["method.name=fedit"])
    assert fedit.method.uniform_rank == "min"
    assert "tau" not in fedit.to_toml()

    silos = Job.default().override(["data.source=silos", "data.path=mine", "data.max_length=64"])
    assert (silos.data.group, silos.data.train_examples, silos.data.max_length) == (None, None, 64)
    assert silos.override(["data.path=theirs"]).data.max_length == 64
    table = silos.override(
        ["data.text=words", "data.source=table"]
    )  # one's own files stay where they are
    assert (table.data.path, table.data.text) == ("mine", "words")
    split = table.override(["data.partition.by=iid"])
    assert split.override(["data.source=silos"]).data.partition == silos.data.partition

    assert Job.default().override(["data.partition.by=iid"]).data.partition.options == {}


def test_steps_and_epochs_replace_each_other_but_not_both() -> None:
    epochs = Job.default().override(["train.local_epochs=2"])
    assert epochs.train.local_steps is None
    steps = epochs.override(["train.local_steps=4"])
    assert (steps.train.local_steps, steps.train.local_epochs) == (4, None)
    with pytest.raises(JobError, match="are both set; give exactly one of them"):
        Job.default().override(["train.local_epochs=2", "train.local_steps=4"])


# ------------------------------------------------------------ derived


@pytest.mark.parametrize(
    ("content", "rank", "alpha", "ranks"),
    [
        ("", 8, 16.0, [8, 8, 8]),
        ("[lora]\nrank = 4\nalpha = 4", 4, 4.0, [4, 4, 4]),
        ("[federation]\nranks = [4, 16]", 16, 32.0, [4, 16, 4]),
        ("[federation]\nranks = [4, 2]\n[lora]\nrank = 6", 6, 12.0, [4, 2, 4]),
        ("[federation]\nranks = { b = 2, a = 5, c = 1 }", 5, 10.0, [5, 2, 1]),
    ],
)
def test_ranks(content: str, rank: int, alpha: float, ranks: list[int]) -> None:
    job = Job.parse(content)
    resolved = job.resolved()
    assert (resolved.lora.rank, resolved.lora.alpha) == (rank, alpha)
    assert resolved.train.head_lr == job.train.lr
    assert resolved.resolved() == resolved
    assert (
        job.ranks(["a", "b", "c"])
        == resolved.ranks(["a", "b", "c"])
        == dict(zip("abc", ranks, strict=True))
    )


def test_a_table_of_ranks_must_fit_the_clients() -> None:
    job = Job.parse("[federation]\nranks = { tweets-0 = 4, tweets-1 = 8 }")
    with pytest.raises(
        JobError, match=r'"tweets-1", which is no client; did you mean "tweets-7"\?'
    ):
        job.ranks(["tweets-0", "tweets-7"])
    with pytest.raises(
        JobError, match=r'has no rank for the client "movies"; give every client one'
    ):
        job.ranks(["tweets-0", "tweets-1", "movies"])


def test_directory_fills_its_places_in() -> None:
    job = Job.default().override(["run.seed=7"])
    assert job.directory() == Path("runs/fedit")
    assert job.override(["run.out=out/{method}-{seed}"]).directory() == Path("out/fedit-7")


def test_digest_tells_runs_apart_but_not_their_directories() -> None:
    job = Job.default()
    assert (
        job.digest()
        == job.override(["run.out=elsewhere"]).digest()
        == Job.parse(job.to_toml()).digest()
    )
    others = [
        job.override([s]).digest()
        for s in ("run.seed=1", "train.lr=2", "method.weights=uniform", "data.text=t")
    ]
    assert len({job.digest(), *others}) == 5


def test_the_job_does_not_import_torch() -> None:
    code = "import sys, fedgrove.job, fedgrove.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fedavg", 'FedAvg of adapters is "fedit"'),
        ("FedProx", "no proximal term"),
        ("scaffold", "no control variates"),
        ("fedadam", "no optimiser at the server"),
        ("Fed-Yogi", "no optimiser at the server"),
        ("fed_prox", "no proximal term"),
        ("centralized", "fedgrove compare --methods fedit,pooled"),
        ("pooled", "fedgrove compare --methods fedit,pooled"),
        ("oracle", "fedgrove compare --methods fedit,pooled"),
    ],
)
def test_names_from_elsewhere_are_answered_with_what_there_is(name: str, words: str) -> None:
    with pytest.raises(JobError, match=words) as refused:
        Job.build({"method": name})
    assert "did you mean" not in str(refused.value)
