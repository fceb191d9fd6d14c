"""The comparison from its command line: every piece once, kept, and reported."""

import json
import subprocess
from pathlib import Path

import pytest
from evidence_case import made

from aape_ssl.evaluation import probe
from aape_ssl.saved.pretrained import load
from benchmarks.evidence import compare, learning, material, runner, study
from benchmarks.evidence.configurations import COMPARED
from benchmarks.evidence.corpora import CorpusError
from benchmarks.evidence.learning import OutOfTimeError
from benchmarks.evidence.pieces import Job
from benchmarks.evidence.results import Results
from benchmarks.evidence.spectrograms import features

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of a collapse, which two steps are
]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    options = {**learning._preset()}
    options["model"] = {**options["model"], "size": [16, 2, 2], "predictor_heads": 2, "top_layers": 2}
    monkeypatch.setattr(learning, "_preset", lambda: options)
    monkeypatch.setattr(material, "make", lambda task, cache, seed, clips: made(cache / "made", task))
    monkeypatch.setattr(material, "FRAMES", 32)
    monkeypatch.setattr(material, "SPEECH", 16)


@pytest.fixture
def in_this_process(monkeypatch):
    """Where what is patched is patched."""

    def execute(worker, jobs, processes):
        for job in jobs:
            for line in worker.do(job):
                print(line)
        return 0

    monkeypatch.setattr(compare, "execute", execute)
    monkeypatch.setattr(study, "execute", execute)


def run(command, tmp_path, **options) -> int:
    given = {"steps": 2, "epochs": 1, "seeds": [0], "tasks": ["trill", "initials"], "shift": ["trill"], "jobs": 1}
    argv = ["--cache", str(tmp_path)]
    for name, value in (given | options).items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return command.main(argv)


PIECES = {
    ("log-mel statistics", "statistics", "frozen", "trill"),
    ("log-mel statistics", "statistics", "frozen", "initials"),
    ("conv", "untrained", "frozen", "trill"),
    ("conv", "untrained", "frozen", "initials"),
    ("conv", "pretrained", "pretraining", ""),
    ("conv", "pretrained", "frozen", "trill"),
    ("conv", "pretrained", "frozen", "initials"),
    ("conv", "pretrained", "shifts", "trill"),
    ("conv", "pretrained", "tuned", "trill"),
    ("conv", "pretrained", "tuned", "initials"),
}


@pytest.mark.usefixtures("in_this_process")
def test_every_piece_once_and_nothing_again(tmp_path, capsys):
    path = tmp_path / "evidence" / "results.jsonl"
    assert run(compare, tmp_path, stems="conv") == 0
    records = Results(path).records()
    assert {(each["row"], each["kind"], each["what"], each["task"]) for each in records} == PIECES
    assert len(records) == len(PIECES)
    for record in records:
        assert record["environment"]["threads"] >= 1
        if record["what"] == "shifts":
            assert [len(hits) for hits in record["hits"].values()] == [16, 16]
        elif record["task"]:
            counts = record["set"]["counts"]
            for hits in record["hits"].values():
                assert all(0 <= hit <= count for hit, count in zip(hits, counts, strict=True))
    # the probes are the product's, and the shifts' first is the frozen one's
    of = {(each["what"], each["kind"], each["task"]): each["hits"] for each in records if each["task"]}
    frozen = of["frozen", "pretrained", "trill"]
    assert of["shifts", "pretrained", "trill"]["unshifted"][0] == frozen["linear"]
    prepared = material.Material.prepare(material.RESULTS, ["trill"], tmp_path)
    set_, (folder,) = prepared.sets["trill"], (tmp_path / "evidence" / "encoders").iterdir()
    kept = prepared.of("trill")
    x = features(load(folder).tokens, kept, 0, kept.rows(set_.clips))
    for score in probe.evaluate("", x, set_.clips, test=["0"]):
        assert set_.hits(score.correct.tolist()) == frozen[score.method]
    text = capsys.readouterr().out
    assert "Frozen, logistic regression" in text
    assert "Shifted by 0 to 15 frames" in text

    before = path.read_bytes()
    assert run(compare, tmp_path, stems="conv") == 0
    assert path.read_bytes() == before
    assert run(compare, tmp_path, stems="conv", epochs=2) == 0  # of pre-training nothing is changed by it
    again = Results(path).records()[len(records) :]
    assert {(each["what"], each["task"]) for each in again} == {("tuned", "trill"), ("tuned", "initials")}
    assert run(compare, tmp_path, stems="conv", steps=3, tune=[], shift=[]) == 0
    again = Results(path).records()[len(records) + 2 :]
    assert {(each["kind"], each["what"]) for each in again} == {("pretrained", "pretraining"), ("pretrained", "frozen")}


@pytest.mark.usefixtures("in_this_process")
def test_more_sound_is_an_experiment_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(material, "make_pool", lambda cache: made(cache / "made", "pool", 12))
    assert run(compare, tmp_path, stems="conv", tune=[], shift=[]) == 0
    assert run(compare, tmp_path, stems="conv", tune=[], shift=[], pool=[]) == 0
    of = {
        name: next(each for each in Results(tmp_path / "evidence" / f"{name}.jsonl").records() if "clips" in each)
        for name in ("results", "results-pool")
    }
    assert {name: each["clips"] for name, each in of.items()} == {"results": 96, "results-pool": 96 + 12}
    assert of["results"]["key"]["pretraining"] != of["results-pool"]["key"]["pretraining"]
    assert of["results-pool"]["hours"] == round(108 * 20 * 0.01 / 3600, 2)
    assert "Pre-trained on 108 clips, 0.0 h." in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_the_study_has_rows_of_its_own(tmp_path, capsys):
    assert run(study, tmp_path, only=["s8-h16", "s8-fixed"], tune=[], shift=[]) == 0
    records = Results(tmp_path / "evidence" / "choices.jsonl").records()
    assert {each["row"] for each in records} == {"log-mel statistics", "s8-h16", "s8-fixed"}
    assert {tuple(each["key"]["set"]["tested"]) for each in records if each["task"]} == {("1",)}
    text = capsys.readouterr().out
    assert "s8-h16 − s8-fixed" in text
    assert "The rule" in text


@pytest.mark.slow
@pytest.mark.exhaustive
def test_processes_share_the_work_and_the_time(tmp_path, monkeypatch, capsys):
    """Jobs reach the processes with their log-mels; one that fails leaves the others alone; late ones are counted."""
    parser = runner.parser("x", "x", 2, (0,), ("trill",))
    args = parser.parse_args(["--cache", str(tmp_path), "--jobs", "1", "--tasks", "trill"])
    worker = runner.prepare(args, material.RESULTS)
    broken = Job("untrained", learning.Configuration("broken", "conv", {"window": 3}), 0)
    monkeypatch.setattr(type(worker), "missing", lambda self, job, done: [("frozen", "trill")])
    assert runner.execute(worker, [Job("statistics"), broken], 1) == 1
    text = capsys.readouterr().out
    assert "broken, seed 0, untrained: failed: ValueError: stem_options: conv has no option window" in text
    (record,) = Results(tmp_path / "evidence" / "results.jsonl").records()
    assert (record["row"], record["task"]) == ("log-mel statistics", "trill")
    late = runner.replace(worker, until=0.0)
    assert runner.execute(late, [Job("statistics")], 1) == 1
    assert "1 rows are not finished" in capsys.readouterr().out


def test_the_script_for_a_gpu_says_what_it_needs(tmp_path):
    script = Path(compare.__file__).with_name("gpu.sh")
    for given in ((), (str(tmp_path), "5", "study")):  # the folder lacks what wheels.sh puts there
        found = subprocess.run([script, *given], capture_output=True, text=True)
        assert (found.returncode, found.stderr.split(":")[0]) == (2, "usage")


def test_order_leaves_whole_seeds_to_a_time_limit():
    jobs = list(map(str, runner.jobs_of(list(COMPARED.values())[:2], [0, 1])))
    assert jobs == [
        "statistics",
        "aape, seed 0, untrained",
        "aape-complex, seed 0, untrained",
        "aape, seed 0, pretrained",
        "aape-complex, seed 0, pretrained",
        "aape, seed 1, pretrained",
        "aape-complex, seed 1, pretrained",
    ]


def test_one_line_where_the_sound_cannot_be_had(monkeypatch, capsys, tmp_path):
    def refuse(*arguments):
        raise CorpusError("gcin-voice: apt-get was not found")

    monkeypatch.setattr(material, "make", refuse)
    assert compare.main(["--cache", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "compare: gcin-voice: apt-get was not found\n"
    assert compare.main(["--cache", str(tmp_path), "--stems", "fft"]) == 1
    assert "stems: expected some of aape, aape-complex" in capsys.readouterr().err


def test_pieces_end_with_the_time(tmp_path):
    args = runner.parser("x", "x", 2, (0,), ("trill",)).parse_args(["--cache", str(tmp_path), "--tasks", "trill"])
    worker = runner.replace(runner.prepare(args, material.RESULTS), until=0.0)
    with pytest.raises(OutOfTimeError):
        list(worker.do(Job("pretrained", COMPARED["conv"], 0)))
    assert json.dumps(Results(tmp_path / "evidence" / "results.jsonl").records()) == "[]"
