from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgrove.federation.load import Table
from fedgrove.federation.partition import ALIASES, partition
from fedgrove.ground.errors import DataError, JobError
from fedgrove.job import Job

MakeJob = Callable[..., Job]


def table(count: int = 240, labels: int = 4, groups: tuple[str, ...] = ()) -> Table:
    names = [f"label-{i * 7 % labels}" for i in range(count)]
    columns: dict[str, list[Any]] = {
        "label": names,
        "age": [float(i * i % 83) for i in range(count)],
    }
    if groups:
        columns["site"] = [groups[i % len(groups)] for i in range(count)]
    rows = [{"text": f"text {i}", "label": names[i]} for i in range(count)]
    return Table(rows, columns, "site" if groups else None, {})


def by(name: str, **options: Any) -> list[str]:
    given = ", ".join(
        f"{key} = {value!r}".replace("True", "true") for key, value in options.items()
    )
    return [f"data.partition.by='{name}'", f"data.partition.options={{{given}}}"]


OPTIONS: dict[str, dict[str, Any]] = {
    "sc-dirichlet": {"partition_by": "label"},
    "inner-dirichlet": {"partition_sizes": [90, 60, 40, 10], "alpha": 50.0},
    "distribution": {
        "distribution_array": [[5.0, 1.0], [5.0, 1.0], [5.0, 1.0], [5.0, 1.0]],
        "num_unique_labels_per_partition": 2,
        "preassigned_num_samples_per_label": 5,
    },
    "continuous": {"partition_by": "age"},
    "natural": {"partition_by": "site"},
    "grouped-natural": {"partition_by": "site", "group_size": 1},
    "size": {"partition_sizes": [100, 60, 50, 30]},
}


@pytest.mark.parametrize("alias", ALIASES)
def test_every_partitioner_deals_out_rows_once_and_depends_on_the_seed_alone(
    alias: str, make_job: MakeJob
) -> None:
    whole = table(groups=("a", "b", "c", "d"))
    whole = Table(whole.rows, whole.columns, None, {})
    settings = [*by(alias, **OPTIONS.get(alias, {})), "federation.clients=4"]
    clients = partition(whole, make_job(*settings))
    assert partition(whole, make_job(*settings)) == clients
    assert len(clients) == 4
    assert list(clients) == sorted(clients)
    dealt = [row for rows, _ in clients.values() for row in rows]
    assert len(dealt) == len(set(dealt))
    assert len(dealt) > 0.8 * 240  # shards and preassigned samples may leave a rest
    if alias not in ("natural", "grouped-natural"):
        assert partition(whole, make_job(*settings, "run.seed=1")) != clients
        assert list(clients) == [f"client-0{i}" for i in range(4)]


def test_a_class_name_of_the_library_works_too(make_job: MakeJob) -> None:
    options = {"num_classes_per_partition": 1, "class_assignment_mode": "deterministic"}
    clients = partition(
        table(), make_job(*by("PathologicalPartitioner", **options), "federation.clients=8")
    )
    for rows, _ in clients.values():
        assert len({table().columns["label"][row] for row in rows}) == 1


def test_a_smaller_alpha_skews_more(make_job: MakeJob) -> None:
    whole = table(600)
    labels = whole.columns["label"]

    def largest_shares(alpha: float) -> float:
        job = make_job(*by("dirichlet", alpha=alpha, min_partition_size=1), "federation.clients=6")
        parts = [rows for rows, _ in partition(whole, job).values()]
        return sum(max(Counter(labels[row] for row in rows).values()) / len(rows) for rows in parts)

    assert largest_shares(0.1) > largest_shares(100.0) + 1


def test_the_seed_decides_the_librarys_draws_too(make_job: MakeJob) -> None:
    def sizes(seed: int) -> list[int]:
        job = make_job(
            *by("dirichlet", min_partition_size=1), "federation.clients=5", f"run.seed={seed}"
        )
        return [len(rows) for rows, _ in partition(table(), job).values()]

    assert sizes(0) == sizes(0)
    assert sizes(0) != sizes(1)


def test_clients_are_spread_over_the_groups_and_stay_within(make_job: MakeJob) -> None:
    whole = table(240, groups=("b", "a", "b"))  # twice as many rows in b
    clients = partition(whole, make_job(*by("iid"), "federation.clients=5"))
    assert list(clients) == ["a-0", "a-1", "b-0", "b-1", "b-2"]
    for name, (rows, group) in clients.items():
        assert {whole.columns["site"][row] for row in rows} == {group} == {name[0]}
    assert sum(len(rows) for rows, _ in clients.values()) == 240


def test_many_clients_of_a_group_sort_by_number(make_job: MakeJob) -> None:
    clients = partition(table(240, groups=("a",)), make_job(*by("iid"), "federation.clients=12"))
    assert list(clients) == [f"a-{i:02}" for i in range(12)]


def test_natural_clients_keep_their_ids_where_they_can(make_job: MakeJob) -> None:
    whole = table(90, groups=("ward-2", "ward-1", "ward-3"))
    clients = partition(whole, make_job(*by("natural")))  # federation.clients = 16 does not matter
    assert {
        name: {whole.columns["site"][row] for row in rows} for name, (rows, _) in clients.items()
    } == {name: {name} for name in ("ward-1", "ward-2", "ward-3")}
    spaced = partition(table(90, groups=("Köln 2", "北 1")), make_job(*by("natural")))
    assert list(spaced) == ["Köln 2", "北 1"]
    odd = partition(table(90, groups=("ward/2", "ward 1")), make_job(*by("natural")))
    assert list(odd) == ["client-00", "client-01"]


def test_natural_clients_within_groups(make_job: MakeJob) -> None:
    whole = table(60, groups=("north", "south"))
    whole.columns["nurse"] = [i % 6 for i in range(60)]
    clients = partition(whole, make_job(*by("natural", partition_by="nurse")))
    assert list(clients) == ["0", "1", "2", "3", "4", "5"]
    assert {group for _, group in clients.values()} == {"north", "south"}


def test_group_names_that_do_not_fit_a_file_name(make_job: MakeJob) -> None:
    job = make_job(*by("iid"), "federation.clients=2")
    assert list(partition(table(groups=("New York!", "Ohio")), job)) == ["New-York-0", "Ohio-0"]
    assert list(partition(table(groups=("北 京", "Köln")), job)) == ["Köln-0", "北-京-0"]
    for groups in (("New York", "new.york", "new-york"), ("?!", "a")):
        with pytest.raises(
            DataError, match=r"the group '.*' of the column 'site' cannot name its clients"
        ):
            partition(table(groups=groups), make_job(*by("iid"), "federation.clients=3"))


def test_nothing_is_printed_or_warned(make_job: MakeJob, capfd: pytest.CaptureFixture[str]) -> None:
    partition(table(groups=("a", "b")), make_job(*by("natural")))
    partition(
        table(120),
        make_job(*by("pathological", num_classes_per_partition=1), "federation.clients=2"),
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            by("dirichelt"),
            r"data\.partition\.by = 'dirichelt' is no way to split rows; did you mean 'dirichlet'\?",
        ),
        (
            by("VerticalEvenPartitioner"),
            r"data\.partition\.by = 'VerticalEvenPartitioner' is no way to split rows",
        ),
        (
            by("dirichlet", alfa=1.0),
            r"options\.alfa = 1\.0 is no option of DirichletPartitioner; .*alpha, min_part",
        ),
        (
            by("linear", step=1),
            r"options\.step = 1 is no option of LinearPartitioner; its options: none",
        ),
        (
            by("dirichlet", num_partitions=3),
            r"options\.num_partitions = 3 is not set here: federation\.clients decides",
        ),
        (by("dirichlet", seed=3), r"options\.seed = 3 is not set here: run\.seed decides"),
        (by("size"), r"options\.partition_sizes is not set, and SizePartitioner needs it"),
        (by("natural"), r"options\.partition_by is not set, and NaturalIdPartitioner needs it"),
        (
            by("dirichlet", alpha=-1.0),
            r"options\.alpha = -1\.0 does not work: Alpha values should be strictly greater",
        ),
        (by("dirichlet", alpha="big"), r"options\.alpha = 'big' does not work"),
        (
            by("pathological", num_classes_per_partition=9),
            r"num_classes_per_partition = 9 does not work: .*greater than",
        ),
        (
            by("size", partition_sizes=[500]),
            r"options\.partition_sizes = \[500\] does not work: .*greater than the size",
        ),
        (
            by("size", partition_sizes=[10, 20]),
            r"makes 2 clients where federation\.clients asks for 16",
        ),
        (
            by("continuous", partition_by="label"),
            r"data\.partition\.by = \"continuous\" does not work",
        ),
        (
            by("dirichlet", alpha=0.001),
            r"no draw gave each of \d+ clients 10 of \d+ rows; lower federation.clients or",
        ),
    ],
)
def test_bad_partitions(settings: list[str], message: str, make_job: MakeJob) -> None:
    with pytest.raises(JobError, match=message) as caught:
        partition(table(), make_job(*settings))
    assert "\n" not in str(caught.value)


def test_too_few_rows_or_clients(make_job: MakeJob) -> None:
    with pytest.raises(
        DataError, match=r"there are 3 rows for 5 clients; lower federation.clients"
    ):
        partition(table(3), make_job(*by("iid"), "federation.clients=5"))
    with pytest.raises(DataError, match="there are 2 rows for 3 clients in the group 'a'"):
        partition(table(4, groups=("a", "b")), make_job(*by("iid"), "federation.clients=6"))
    with pytest.raises(
        JobError, match=r"federation\.clients = 2 is fewer than the 3 groups of the column 'site'"
    ):
        partition(table(groups=("a", "b", "c")), make_job(*by("iid"), "federation.clients=2"))


def test_a_bad_option_names_the_group_it_fails_in(make_job: MakeJob) -> None:
    whole = table(12, groups=("a", "b", "b", "b"))
    with pytest.raises(
        JobError, match=r"min_partition_size = 2.* does not work in the group 'a'|in the group 'a'"
    ):
        partition(whole, make_job(*by("dirichlet", min_partition_size=2), "federation.clients=4"))


def test_the_library_sends_no_telemetry(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import urllib.request

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a partition needs no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    assert len(partition(table(), make_job(*by("iid"), "federation.clients=3"))) == 3
