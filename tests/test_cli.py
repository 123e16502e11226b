"""The shell's door: every verb on a tiny pair, what it prints, what it writes, its exit code; and bad input in one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import builders
import letters
import made_policies
import specdec_lab as sd
import tiny
from specdec_lab import trace
from specdec_lab.bench import demo_run, judges, sessions, tuning
from specdec_lab.cli import main
from specdec_lab.commands import screen
from specdec_lab.commands.mistakes import UserMistake, asked
from specdec_lab.commands.parser import ENGINES, NOTEBOOK, SHELL, WORKLOADS, Finished, build_parser, options_of
from specdec_lab.commands.replaying import paced
from specdec_lab.commands.screen import Screen
from specdec_lab.commands.spelling import seconds, split_cells, split_configs, split_counts
from specdec_lab.commands.tuning import exit_code, progress_line
from specdec_lab.export import TARGETS
from specdec_lab.policy import Policy
from specdec_lab.stream import Stream, record
from specdec_lab.trace import read_run, write_run
from specdec_lab.tune import Progress, Protocol
from specdec_lab.tune.folder import RunFolder
from specdec_lab.workload import KINDS

VERBS = (
    "load", "run", "profile", "tune", "resume", "db", "policy", "export", "replay", "doctor", "limits", "bench", "gpu",
    "acceptance", "demo",
)  # fmt: skip


@pytest.fixture(autouse=True)
def empty_place(tmp_path, monkeypatch):
    """Verbs write below the working folder; nothing of this machine may be found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def random_text(monkeypatch):
    """Random prompts in place of the shipped text, which takes a second to cut into letters."""
    monkeypatch.setattr(sessions, "_held_out", lambda pair, kind, max_new_tokens, sampling: letters.random_text())
    monkeypatch.setattr(judges, "DISTURBED", float("inf"))  # blocks of one round cannot tell


def call(*words, load=None):
    """(exit code, output, errors) of a command."""
    out, err = io.StringIO(), io.StringIO()
    code = main([str(word) for word in words], load=load or letters.loader(), out=out, err=err)
    return code, out.getvalue(), err.getvalue()


def refused(*words, **options):
    """The one line that a mistake gives."""
    code, out, err = call(*words, **options)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("specdec-lab: error: ")
    return err.removeprefix("specdec-lab: error: ").strip()


# The parser.


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: {SHELL} {verb}" in text
    assert f"examples:\n  {SHELL} {verb}" in text


def test_the_notebook_has_the_same_verbs_and_two_more():
    assert [*options_of(build_parser(NOTEBOOK), [])] == sorted([*VERBS, "stop", "status", "-h", "--help", "--version"])
    assert [*options_of(build_parser(SHELL), [])] == sorted([*VERBS, "-h", "--help", "--version"])
    with pytest.raises(Finished):
        build_parser(NOTEBOOK).parse_args(["run", "-h"])


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"specdec_lab {sd.__version__}\n"


def test_choices_of_the_parser_are_those_of_the_rooms():
    assert WORKLOADS == KINDS
    assert tuple(TARGETS) == ENGINES


def test_help_and_mistakes_load_neither_torch_nor_the_view_and_are_quick_to_parse():
    code = (
        "import sys; from specdec_lab.cli import main\n"
        "assert main(['profile', '--help']) == 0 and main(['profile', '--cells', '3']) == 2\n"
        "heavy = {'torch', 'transformers', 'plotly', 'optuna', 'numpy', 'ipywidgets', 'IPython'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "specdec_lab", "run"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "run needs something to continue" in done.stderr


def test_lists_are_split_where_spellings_end():
    assert [str(c) for c in split_cells("1x1024, 8x4k")] == ["1x1024", "8x4096"]
    spelled = "off,model:full/4,2,1,self:4+60/chain3,model:4+28/tree:-1,-1,0"
    assert ",".join(map(str, split_configs(spelled))) == spelled
    assert [str(c) for c in split_configs(spelled)][1] == "model:full/4,2,1"
    assert split_counts("512,1k,4K") == (512, 1024, 4096)


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("2m", 120), ("0.5h", 1800)])
def test_durations(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["0", "-3", "2d", "", "s"])
def test_a_duration_must_be_one(text):
    with pytest.raises(ValueError, match="90s, 2m or 0.5h"):
        seconds(text)


# What is asked wrongly.


@pytest.mark.parametrize(("words", "message"), [
    ("profile --cells 1x64 --configs self:4+60/chain", "config 'self:4+60/chain', column 11: tree 'chain' is none of"),
    ("profile --cells 1x64 --configs off,slef:4+60/chain3", "config 'slef:4+60/chain3', column 1: drafter 'slef' is none of"),
    ("profile --cells 1x64 --configs self:4-60/chain3", "config 'self:4-60/chain3', column 6: view '4-60' is none of"),
    ("profile --cells 1x64 --configs self:4+0/chain3", "column 6: KvView.recent must be at least 1 token"),
    ("profile --cells 1x64 --configs self:4+60/chain0", "column 11: tree 'chain0': a chain has 1 to 64 drafted tokens, got 0"),
    ("profile --cells 1x64 --configs self:4+60/chain1000", "a chain has 1 to 64 drafted tokens, got 1000"),
    ("profile --cells 1y64 --configs off", "cell '1y64' is not of the form BATCHxLENGTH"),
    ("profile --cells 1x64,,2x64 --configs off", "holds an empty cell"),
    ("profile --cells 1x64 --configs off --block-seconds 0", "a duration above 0 is written 90s, 2m or 0.5h, got '0'"),
    ("profile --configs off", "the following arguments are required: --cells"),
    ("tune --batches 0", "a count must be at least 1, got '0'"),
    ("tune --lengths 4x", "must be a whole number such as 512 or 4k, got '4x'"),
    ("replay t.jsonl --speed 0", "a number above 0 is needed, got '0'"),
    ("export p.json --to vlm", "invalid choice: 'vlm'"),
    ("runn", "invalid choice: 'runn'"),
    ("", "the following arguments are required: VERB"),
    ("run --promt x", "unrecognized arguments: --promt x"),
])
def test_a_typo_is_answered_with_its_place_and_where_to_look(words, message):
    said = refused(*words.split())
    assert message in said
    assert said.endswith("--help")


@pytest.mark.parametrize(("words", "message"), [
    ("run", "run needs something to continue: --prompt TEXT"),
    ("run --prompt=", "the prompt is empty"),
    ("run --file nowhere.txt", "cannot read prompts from nowhere.txt: No such file or directory"),
    ("run --file .", "cannot read prompts from .: Is a directory"),
    ("run --workload prose", "--workload prose needs --cell"),
    ("run --prompt x --cell 1x64", "--cell belongs to --workload"),
    ("run --prompt x --config nowhere.json", "policy nowhere.json: cannot be read: No such file or directory. Make one with"),
    ("run --prompt x --config self:4+60", "config 'self:4+60': the tree is missing"),
    ("run --prompt x --config model:snapkv64+8/2,2", "model:snapkv64+8/2,2: SnapKV chooses among the target's own keys"),
    ("run --prompt x --temperature -1", "temperature must be 0 (greedy) or more, got -1.0"),
    ("run --prompt x --top-p 0", "top_p must lie in (0, 1], got 0.0"),
    ("run --prompt x --max-new-tokens 9000", "prompt and reply need 9001 tokens"),
    ("run --prompt x --trace t.csv", "t.csv must end in .jsonl or .jsonl.gz"),
    ("run --prompt x --perfetto .", ". must end in .json or .json.gz"),
    ("run --prompt x --backend cuda9", "there is no back end 'cuda9'; known: auto"),
    ("profile --cells 1x9000 --configs off", "none of these cells can run. 1x9000 skipped: LlamaForCausalLM has 1024"),
    ("profile --cells 90000000x900 --configs off", "bytes, more than cpu has free"),
    ("tune --lengths 9000 --batches 1 --db db", "positions, the cell asks for 9000 tokens"),
    ("load ./nowhere", "no model at the path or hub name './nowhere'"),
    ("load --as 2x", "--as needs a variable name, got '2x'"),
    ("load --as engine", "--as keeps an engine in a notebook"),
    ("policy show", "there is no policy.json here; `tune` writes one"),
    ("policy explain", "there is no policy.json here"),
    ("replay nowhere.jsonl", "there is no trace at nowhere.jsonl"),
    ("replay .", "the folder . holds no trace"),
])
def test_a_mistake_is_one_line_that_says_what_to_do(words, message, random_text):
    assert message in refused(*words.split())


def test_a_model_without_tokenizer_is_told_so():
    bare = letters.loader(tokenizer=None)
    assert "without a tokenizer and cannot read text" in refused("run", "--prompt", "x", load=bare)
    said = refused("profile", "--cells", "1x64", "--configs", "off", load=bare)
    assert "the shipped prose text cannot be given to it" in said


def test_a_prompt_beyond_the_models_positions_is_refused_with_both_numbers():
    Path("long.txt").write_text("x" * 1500)
    assert "prompt 0 has 1500 tokens; LlamaForCausalLM has 1024 positions" in refused("run", "--file", "long.txt")
    Path("empty.txt").write_text("")
    assert "empty.txt is empty: there is nothing to continue" in refused("run", "--file", "empty.txt")
    Path("binary.txt").write_bytes(b"\xff\xfe")
    assert "binary.txt is not UTF-8 text" in refused("run", "--file", "binary.txt")


def test_places_that_cannot_be_written_are_found_before_anything_is_measured(tmp_path, random_text):
    Path("file").write_text("")
    below = refused(*["profile", "--cells", "1x64", "--configs", "off", "--trace", "file/below"])
    assert "cannot write to the folder file/below: " in below
    assert "cannot write to the folder file: " in refused("run", "--prompt", "x", "--trace", "file/run.jsonl")
    assert "cannot write to the folder file: " in refused("tune", "--lengths", "64", "--out", "file/policy.json")
    said = refused("tune", "--lengths", "64", "--batches", "1", "--db", "file/db")
    assert "cannot be written: Not a directory" in said
    Path("run.jsonl").write_text("mine")
    assert "the file exists" in refused("run", "--prompt", "x", "--trace", "run.jsonl")
    assert Path("run.jsonl").read_text() == "mine"


def test_a_foreign_file_is_no_trace_and_a_newer_schema_is_named():
    Path("foreign.jsonl").write_text('{"a": 1}\n')
    assert "foreign.jsonl is no trace: a run header must come first" in refused("replay", "foreign.jsonl")


def test_weights_that_do_not_fit_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.model().save_pretrained("model")
    weights = load_file("model/model.safetensors")
    weights.pop("model.norm.weight")
    save_file({**weights, "model.extra.weight": weights["model.embed_tokens.weight"].clone()}, "model/model.safetensors")
    said = refused("load", "./model")
    assert "model.norm.weight" in said
    assert "model.extra.weight" in said


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, random_text):
    def broken(self, workload):
        return [][1]

    monkeypatch.setattr(sd.Engine, "open", broken)
    with pytest.raises(IndexError):
        call("profile", "--cells", "1x64", "--configs", "off")


def test_only_our_own_words_count_as_the_users_mistake():
    with pytest.raises(UserMistake, match="a count must be at least 1"), asked():
        sd.records.parse_count("0")
    with pytest.raises(ValueError, match="invalid literal"), asked():
        json.loads("1", parse_int=lambda text: int("x"))
    with pytest.raises(UserMistake, match="nowhere: No such file"), asked():
        open("nowhere").close()


# What is asked rightly.


def test_load_says_what_was_loaded():
    code, out, _ = call("load")
    assert code == 0
    assert "parameters" in out
    data = json.loads(call("load", "--json")[1])
    assert data["target"]["runner"] == "fast"
    assert data["drafters"] == ["off", "self", "ngram", "model"]


def test_run_prints_the_text_and_a_table():
    plain = call("run", "--prompt", "hello", "--max-new-tokens", 20)
    fast = call("run", "--prompt", "hello", "--max-new-tokens", 20, "--config", "self:4+28/chain3")
    assert plain[0] == fast[0] == 0
    assert plain[1].splitlines()[0] == fast[1].splitlines()[0]
    assert "tokens/s" in fast[1]
    assert fast[2] == ""  # no terminal: nothing is drawn


def test_run_gives_json_alone_and_writes_what_was_asked_for(tmp_path):
    Path("prompts.jsonl").write_text('{"text": "one"}\n{"text": "two more"}\n')
    code, out, _ = call("run", "--file", "prompts.jsonl", "--config", "ngram/chain4", "--max-new-tokens", 12, "--json",
                        "--trace", "deep/run.jsonl.gz", "--perfetto", "deep/run.json")
    data = json.loads(out)
    assert code == 0
    assert len(data["tokens"]) == 2
    assert [len(text) for text in data["texts"]] == [len(tokens) for tokens in data["tokens"]]
    assert data["header"]["config"] == data["summary"]["config"] == "ngram/chain4"
    traced = read_run("deep/run.jsonl.gz").run
    assert traced.tokens() == data["tokens"]
    assert not traced.interrupted
    assert json.loads(Path("deep/run.json").read_text())["traceEvents"]


def test_run_takes_several_prompts_and_shipped_text():
    data = json.loads(call("run", "--prompt", "a", "--prompt", "bcd", "--max-new-tokens", 5, "--json")[1])
    assert len(data["texts"]) == 2
    data = json.loads(call("run", "--workload", "code", "--cell", "2x40", "--max-new-tokens", 4, "--json")[1])
    assert data["header"]["cell"] == "2x40"
    assert data["header"]["workload"] == "code"


def test_run_samples_with_the_arguments_it_is_given():
    words = ("run", "--prompt", "a", "--max-new-tokens", 30, "--json", "--temperature", 1.5, "--verifier", "coupled")
    first, again, other = (json.loads(call(*words, "--seed", seed)[1]) for seed in (1, 1, 2))
    assert first["tokens"] == again["tokens"] != other["tokens"]
    assert first["header"]["verifier"] == "coupled"


def test_run_decodes_with_a_policy_and_says_when_it_does_not_belong_here():
    made_policies.LOOKUP.save("policy.json")
    code, out, err = call("run", "--prompt", "hello", "--config", "policy.json", "--max-new-tokens", 4, "--json")
    assert code == 0
    assert err.startswith("specdec-lab: note: policy not used, decoding plainly: ")
    assert err.count("\n") == 1
    assert json.loads(out)["summary"]["num_draft_tokens"] == 0


def test_profile_measures_traces_and_reports(random_text):
    code, out, _ = call("profile", "--cells", "1x20,2x24", "--configs", "ngram/chain2", "--blocks", 2, "--block-seconds", 0.001,
                        "--trace", "traces", "--report", "report.html", "--json")
    data = json.loads(out)
    assert code == 0
    assert [(c["cell"], c["config"]) for c in data["comparisons"]].count(("2x24", "ngram/chain2")) == 1
    assert {c["config"] for c in data["comparisons"]} == {"off", "ngram/chain2"}
    assert data["notices"][0].startswith("plain decoding (off) was added")
    assert data["mismatches"] == []
    assert len(list(Path("traces").iterdir())) == 8
    assert read_run("traces/1x20_ngram-chain2_block1.jsonl.gz").run.header.block == 1
    assert "ngram/chain2" in Path("report.html").read_text()
    code, out, _ = call("replay", "traces", "--json")
    assert [(c["cell"], c["config"], c["speedup"] and c["speedup"]["mean"]) for c in json.loads(out)["comparisons"]].sort() == [
        (c["cell"], c["config"], c["speedup"] and c["speedup"]["mean"]) for c in data["comparisons"]
    ].sort()


def test_profile_ends_with_a_table_of_verdicts_and_names_skipped_cells(random_text):
    words = ("profile", "--cells", "1x20,1x9000", "--configs", "off,ngram/chain2")
    code, out, _ = call(*words, "--blocks", 2, "--block-seconds", 0.001)
    assert code == 2
    assert "1x20 ngram/chain2: " in out
    assert "1x9000 skipped: LlamaForCausalLM has 1024 positions" in out


def test_a_red_gate_shows_no_speed_and_its_own_exit_code(random_text, monkeypatch):
    bent = judges.Mismatch(sd.Cell(1, 20), "ngram/chain2", 0, 3, 5, 6)
    monkeypatch.setattr(judges.TokenGate, "find", lambda self, config: bent if str(config) == "ngram/chain2" else None)
    code, out, _ = call("profile", "--cells", "1x20", "--configs", "ngram/chain2", "--blocks", 2, "--block-seconds", 0.001)
    assert code == 1
    assert "wrong tokens: 1x20 ngram/chain2: row 0 emits token 5 at new token 3, plain decoding 6" in out
    assert not any(line.startswith("1x20  ngram/chain2") for line in out.splitlines())


TRACED = ("profile", "--cells", "1x20", "--configs", "off", "--blocks", 9, "--block-seconds", "0.000001", "--trace", "traces")


def test_a_full_disk_costs_a_trace_and_not_the_profile(random_text, monkeypatch):
    honest, steps = trace.TraceWriter.__call__, []

    def full(self, step):
        steps.append(step)
        if len(steps) == 4:
            raise trace.TraceError(self.path, "No space left on device", self.num_steps)
        honest(self, step)

    monkeypatch.setattr(trace.TraceWriter, "__call__", full)
    code, out, err = call(*TRACED)
    assert code == 0
    assert "baseline" in out
    assert "cannot write the trace traces/1x20_off_block3.jsonl.gz: No space left on device" in err
    assert err.count("\n") == 1


def test_a_trace_that_cannot_be_begun_ends_a_profile_with_what_was_measured(random_text, monkeypatch):
    honest, opened = trace.TraceWriter.__init__, []

    def gone(self, path, header, **options):
        opened.append(path)
        if len(opened) == 4:
            raise trace.TraceError(path, "Read-only file system", 0)
        honest(self, path, header, **options)

    monkeypatch.setattr(trace.TraceWriter, "__init__", gone)
    code, out, err = call(*TRACED)
    assert code == 2
    assert "baseline" in out
    assert err.startswith("specdec-lab: error: cannot write the trace traces/1x20_off_block3.jsonl.gz: Read-only file system")
    assert err.count("\n") == 1


def test_an_interrupt_keeps_what_was_measured(random_text, monkeypatch):
    honest, seen = sessions.Sessions.open, []

    def interrupting(self, cell):
        seen.append(cell)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return honest(self, cell)

    monkeypatch.setattr(sessions.Sessions, "open", interrupting)
    code, out, _ = call("profile", "--cells", "1x20,2x20", "--configs", "off", "--blocks", 2, "--block-seconds", 0.001)
    assert code == 130
    assert "1x20" in out


@pytest.fixture
def quick_tuning(monkeypatch, random_text):
    """Blocks of few rounds, and no machine that is too busy."""
    honest = tuning.make_plan
    quick = Protocol(race_run_s=1e-6, duel_run_s=1e-6, min_rounds=2, race_blocks=2, max_trials=2, busy_retries=0)
    small = {"protocol": quick, "windows": (32,), "chains": (2,)}
    monkeypatch.setattr(tuning, "make_plan", lambda *words, **options: honest(*words, **{**options, **small}))


def test_tune_writes_policy_and_records_and_resumes(quick_tuning):
    words = ("tune", "--batches", "1,2", "--lengths", "20,40", "--budget", "60s", "--db", "db", "--run", "runs/t", "--json")
    code, out, err = call(*words)
    data = json.loads(out)
    assert code in (0, 4)
    assert exit_code(Policy.load("policy.json")) == code
    assert [row["cell"] for row in data["policy"]["table"]] == ["1x20", "1x40", "2x20", "2x40"]
    assert err.count("\n") == 4  # a line per finished cell
    assert "4/4 cells" in err
    lines = {path.name: len(path.read_text().splitlines()) for path in Path("db").rglob("*.jsonl")}
    assert call(*words)[0] == code
    assert {path.name: len(path.read_text().splitlines()) for path in Path("db").rglob("*.jsonl")} == lines


def test_a_run_folder_of_another_plan_or_in_use_is_named(quick_tuning):
    words = ("tune", "--batches", 1, "--lengths", 20, "--budget", "60s", "--db", "db", "--run", "runs/t")
    assert call(*words)[0] in (0, 4)
    assert "runs/t holds another plan (cells, configs differ)" in refused(*words, "--lengths", 40)
    before = Path("policy.json").read_text()
    held = tuning.prepare(sd.Engine(letters.pair()), [1], [20], 60.0, database="db", run_dir="runs/t")
    with RunFolder(held.run_dir, held.plan, held.engine.identity(), "prose", 0.0, 0):
        assert "another tuner is running in this run folder" in refused(*words)
    assert Path("policy.json").read_text() == before


def test_an_interrupted_tuning_is_kept_and_goes_on(quick_tuning, monkeypatch):
    honest, calls = sessions.Sessions.__call__, []

    def interrupting(self, cell, config):
        calls.append(cell)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return honest(self, cell, config)

    monkeypatch.setattr(sessions.Sessions, "__call__", interrupting)
    words = ("tune", "--batches", 1, "--lengths", "20,40", "--budget", "60s", "--db", "db", "--run", "runs/t")
    code, out, _ = call(*words)
    assert code == 130
    assert "Run the same command again to go on" in out
    assert "interrupted" in Policy.load("policy.json").header["labels"]
    assert call(*words)[0] in (0, 4)


def test_tune_without_time_gives_a_partial_policy(quick_tuning):
    code, out, _ = call("tune", "--batches", 1, "--lengths", "20,40", "--budget", "0.000001s", "--db", "db")
    assert code == 3
    assert "not_visited" in out
    assert "Run the same command again to go on" in out
    assert Path("policy.json").exists()


def test_a_dry_run_measures_nothing_and_writes_nothing(quick_tuning):
    code, out, _ = call("tune", "--batches", "1", "--lengths", "20,9000", "--dry-run")
    assert code == 0
    assert "1. 1x20: " in out
    assert "1x9000: left out, LlamaForCausalLM has 1024 positions" in out
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(("labels", "table", "code"), [
    ((), {"1x512": {"ngram/chain6": 1.7}}, 0), ((), {"1x512": {"ngram/chain6": 0.9}}, 4),
    (("partial",), {"1x512": {"ngram/chain6": 1.7}, "2x512": "not_visited"}, 3),
    (("interrupted", "partial"), {"1x512": {}}, 130),
])
def test_exit_codes_of_tuning(labels, table, code):
    assert exit_code(made_policies.policy(table, labels)) == code


def test_progress_says_where_it_is_and_how_long_it_takes():
    progress = Progress(sd.Cell(8, 4096), "ngram/chain4", "search", 2, 9, 31.0, 77.4, "self:4+60/chain3", 1.21, 3)
    assert progress_line(progress) == (
        "2/9 cells, 31 s, 77 s left | 8x4096 search ngram/chain4 block 3 | best self:4+60/chain3 1.21x"
    )


def test_policy_shows_its_table_an_answer_and_its_reasons():
    made_policies.LOOKUP.save("policy.json")
    code, out, _ = call("policy", "show")
    assert code == 0
    assert "speculate in 2 of 2 feasible cells, 1.20x to 1.70x" in out
    assert "1x512  tuned  ngram/chain6  1.70x" in out
    assert json.loads(call("policy", "show", "--json")[1])["portfolio"] == ["off", "ngram/chain6"]
    assert call("policy", "show", "2x512")[1].startswith("2x512: ngram/chain6, because 1.4")
    assert json.loads(call("policy", "show", "64x512", "--json")[1])["config"] == "off"
    assert "50.0% of 1x512" in call("policy", "explain", "2x512", "--policy", "policy.json")[1]
    assert "needs a cell" in refused("policy", "explain")


def test_policy_check_knows_a_policy_of_another_device():
    made_policies.LOOKUP.save("policy.json")
    code, out, _ = call("policy", "check")
    assert code == 1
    assert "does not belong here and would answer off: it was made for device TEST_2t" in out


def test_a_broken_policy_is_named_with_file_and_field():
    Path("policy.json").write_text('{"schema": "specdec_lab.policy/9"}')
    said = refused("policy", "show")
    assert "policy policy.json, schema: this reader knows specdec_lab.policy/1, got 'specdec_lab.policy/9'" in said
    Path("policy.json").write_text('{"schema": ')
    assert "is not JSON" in refused("policy", "show")


def test_export_prints_or_writes_and_always_says_what_is_lost():
    made_policies.LOOKUP.save("policy.json")
    code, out, _ = call("export", "--to", "vllm", "--length", "512")
    assert code == 0
    assert "lost:" in out
    code, out, _ = call("export", "policy.json", "--to", "vllm", "--length", 512, "--out", "deploy", "--json")
    assert code == 0
    data = json.loads(out)
    assert all(Path(path).exists() for path in data["written"])
    assert len(data["written"]) == len(data["files"])


@pytest.mark.parametrize(("words", "message"), [
    (("--to", "vllm", "--option", "batch=4"), "vllm takes no option batch"),
    (("--to", "vllm", "--option", "draft_model"), "an option is written NAME=VALUE"),
    (("--to", "llama_cpp", "--option", "batch=four"), "option batch needs a number, got 'four'"),
    (("--to", "vllm", "--option", "ngram_match=4"), "option ngram_match needs two numbers such as 2,4"),
])
def test_export_options_are_checked(words, message):
    made_policies.LOOKUP.save("policy.json")
    assert message in refused("export", "policy.json", *words)


def test_export_options_reach_the_engine():
    made_policies.LOOKUP.save("policy.json")
    words = ("export", "policy.json", "--length", "512", "--option", "ngram-match=2,3")
    assert json.loads(call(*words, "--to", "llama_cpp", "--option", "batch=4", "--json")[1])["command"]
    assert '"prompt_lookup_max": 3' in call(*words, "--to", "vllm")[1].replace("\\", "")


def test_a_folder_of_traces_is_replayed_in_the_order_of_recording(tmp_path):
    moments = {"a": "2026-01-01T00:00:02.000+00:00", "b": "2026-01-01T00:00:00.500+00:00", "c": "2026-01-01T00:00:02.000+00:00"}
    blocks = {"a": 3, "b": 1, "c": 2}
    for name, moment in moments.items():
        run = builders.run_of(builders.off_step(), created=moment, block=blocks[name], config="off", run_id=name)
        write_run(run, tmp_path / f"{name}.jsonl")
    code, out, _ = call("replay", str(tmp_path), "--json")
    assert code == 0
    assert [run["header"]["run_id"] for run in json.loads(out)["runs"]] == ["b", "c", "a"]


def test_replay_repeats_a_run_and_counts_damaged_lines():
    run = builders.run_of(builders.prefill_step(), builders.round_step((1, 2)), builders.round_step((3, 0)))
    path = write_run(run, "run.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "{half", *lines[2:]]) + "\n")
    code, out, err = call("replay", "run.jsonl", "--json", "--perfetto", "run.json")
    assert code == 0
    assert json.loads(out)["runs"][0]["num_steps"] == 3
    assert err == "specdec-lab: note: run.jsonl: 1 lines were cut or are not ours and were skipped\n"
    assert json.loads(Path("run.json").read_text())["traceEvents"]
    write_run(run, "second.jsonl")
    assert "--perfetto writes the timeline of one trace, 2 were given" in refused("replay", ".", "--perfetto", "x.json")


def test_a_paced_replay_waits_as_long_as_each_step_took():
    waits = []
    stream = Stream(builders.header(), iter([builders.round_step(), builders.round_step(scale=2.0)]))
    assert len(record(paced(stream, 4.0, waits.append)).steps) == 2
    assert waits == [0.25, 0.5]


def test_doctor_gives_a_table_and_json_also_without_a_model():
    code, out, _ = call("doctor")
    assert code == 0
    assert "ceilings" in out
    data = json.loads(call("doctor", "--model", "./nowhere", "--json")[1])
    assert {f["topic"]: f["state"] for f in data["findings"]}["model"] == "missing"


def test_bench_overhead_is_printed_and_saved_only_when_asked(random_text):
    words = ("bench", "overhead", "--cell", "2x20", "--config", "off", "--run-rounds", 3, "--blocks", 2, "--db", "db")
    code, out, _ = call(*words)
    assert code == 0
    assert "median of 2 blocks" in out
    assert not Path("db").exists()
    row = json.loads(call(*words, "--save", "--json")[1])
    assert json.loads(Path("db/bench/overhead.jsonl").read_text()) == row


def test_the_demo_says_what_happened_and_where_everything_is(random_text, monkeypatch, quick_tuning):
    monkeypatch.setattr(demo_run, "LARGE", sd.Cell(2, 40))
    monkeypatch.setattr(demo_run, "SMALL", sd.Cell(1, 20))
    monkeypatch.setattr(demo_run, "GRID", ((1, 2), (20, 40)))
    monkeypatch.setattr(demo_run, "BLOCKS", 2)
    monkeypatch.setattr(demo_run, "BLOCK_S", 0.001)
    code, out, err = call("demo", "--out", "demo", "--budget", "60s")
    assert code == 0
    for name in ("report.html", "policy.json", "trace.jsonl.gz", "timeline.json.gz", "tuning_db"):
        assert (Path("demo") / name).exists()
        assert f"demo/{name}" in out
    assert "machine" in err or "cores" in err
    assert not Path("tuning_db").exists()
    assert os.listdir() == ["demo"]


# The terminal.


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_redrawn_in_place_and_left_clean():
    now = iter(range(100))
    terminal = Terminal()
    shown = Screen(terminal, clock=lambda: next(now))
    shown.draw(lambda: "one\ntwo")
    shown.draw(lambda: "three")
    assert terminal.getvalue() == "one\ntwo\n\x1b[2F\x1b[Jthree\n"
    shown.say("stays")
    assert terminal.getvalue().endswith("\x1b[1F\x1b[Jstays\n")


def test_a_terminal_is_not_redrawn_faster_than_it_can_be_read():
    terminal = Terminal()
    shown = Screen(terminal, clock=lambda: 5.0)
    for _ in range(9):
        shown.draw(lambda: "x")
    assert terminal.getvalue() == "x\n"


def test_a_profile_in_a_terminal_shows_its_table_while_it_runs(random_text, monkeypatch):
    monkeypatch.setattr(screen, "REDRAW_S", 0.0)
    terminal, out = Terminal(), io.StringIO()
    words = ["profile", "--cells", "1x20", "--configs", "off,ngram/chain2", "--blocks", "2", "--block-seconds", "0.001"]
    assert main(words, load=letters.loader(), out=out, err=terminal) == 0
    assert "profile of prose, 1x20: " in terminal.getvalue()
    assert "tokens/s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[J")
    assert "\x1b" not in out.getvalue()
