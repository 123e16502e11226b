"""The notebook's door, in a real IPython shell: what a magic returns, what it says of mistakes, and what it leaves behind."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import letters
import made_policies
import specdec_lab as sd
from specdec_lab import magics
from specdec_lab.bench import judges, sessions, tuning
from specdec_lab.bench.doctor import Diagnosis
from specdec_lab.commands import background
from specdec_lab.commands.replaying import paced
from specdec_lab.policy import Policy
from specdec_lab.tune import Protocol
from specdec_lab.view.live import LiveRun

PROFILE = "specdec profile --cells 1x20 --configs off,ngram/chain2 --blocks 2 --block-seconds 0.001"


def own_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("specdec-")]


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A shell with the extension loaded, tiny models and random prompts; unloaded afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(sessions, "_held_out", lambda pair, kind, max_new_tokens, sampling: letters.random_text())
    monkeypatch.setattr(judges, "DISTURBED", float("inf"))  # blocks of one round cannot tell
    made = InteractiveShell.instance()
    made.reset()
    made.extension_manager.load_extension("specdec_lab")
    magics_of(made).lab._load = letters.loader()
    yield made
    made.extension_manager.unload_extension("specdec_lab")


def magics_of(shell):
    return shell.magics_manager.registry["SpecdecMagics"]


def run(shell, text):
    """The value of a cell; its error is raised."""
    done = shell.run_cell(text)
    done.raise_error()
    return done.result


def mistake(shell, text):
    with pytest.raises(UsageError) as caught:
        run(shell, text)
    return str(caught.value)


# Objects.


def test_a_magic_returns_the_object_that_a_user_could_have_made(shell):
    assert isinstance(run(shell, "%specdec load"), sd.ModelPair)
    assert isinstance(run(shell, "%specdec doctor"), Diagnosis)
    live = run(shell, "x = %specdec run --prompt hello --max-new-tokens 8\nx")
    assert isinstance(live, LiveRun)
    assert live is shell.user_ns["x"]
    (finished,) = live.wait()
    assert isinstance(finished, sd.Run)


def test_the_cell_body_is_the_prompt(shell, monkeypatch):
    monkeypatch.setenv("SPECDEC_DISPLAY", "static")
    live = run(shell, "%%specdec run --config ngram/chain4 --max-new-tokens 9\nline one\nline two\n")
    (finished,) = live.wait()
    assert finished.header.config == "ngram/chain4"
    assert finished.header.cell == sd.Cell(1, len("line one\nline two"))
    assert live.texts() == [letters.Letters().decode(finished.tokens()[0])]
    assert live.texts()[0] in str(live)
    assert "<pre" in live._repr_mimebundle_()["text/html"]


def test_a_cell_body_belongs_to_run_alone(shell):
    assert mistake(shell, "%%specdec profile --cells 1x20 --configs off\nbody") == (
        "a cell body is a prompt for run, not for profile; write it in one line: %specdec ..."
    )
    assert "leave out --prompt" in mistake(shell, "%%specdec run --prompt x\nbody")


def test_loading_keeps_the_engine_for_later_verbs_and_under_a_name(shell):
    run(shell, "%specdec load --as mine")
    mine = shell.user_ns["mine"]
    assert isinstance(mine, sd.Engine)
    run(shell, "%specdec run --prompt x --max-new-tokens 2").wait()
    assert magics_of(shell).lab.engine is mine
    run(shell, "%specdec run --prompt x --max-new-tokens 2 --backend sdpa").wait()
    assert magics_of(shell).lab.engine is not mine
    assert magics_of(shell).lab.engine.backend.name == "sdpa"


def test_a_profile_runs_behind_the_cell_and_gives_all_its_runs(shell, capsys):
    live = run(shell, PROFILE.replace("off,", "").replace("specdec", "%specdec", 1))
    runs = live.wait()
    assert len(runs) == 4
    assert {r.header.block for r in runs} == {0, 1}
    assert "plain decoding (off) was added" in capsys.readouterr().out
    assert "ngram/chain2" in live._repr_mimebundle_()["text/plain"]


def test_a_live_profile_shows_no_speed_of_wrong_tokens(shell, monkeypatch):
    bent = judges.Mismatch(sd.Cell(1, 20), "ngram/chain2", 0, 3, 5, 6)
    monkeypatch.setattr(judges.TokenGate, "find", lambda self, config: bent if str(config) == "ngram/chain2" else None)
    live = run(shell, f"%{PROFILE}")
    assert {r.header.config for r in live.wait()} == {"off", "ngram/chain2"}
    assert {c.config for c in live.comparison()} == {"off"}
    assert "other tokens than plain decoding" in live.runs[-1].header.labels + live.runs[-2].header.labels


def test_values_of_the_notebook_are_put_into_the_line(shell):
    shell.user_ns.update(n=7, config=sd.SpecConfig.parse("ngram/chain3"))
    (finished,) = run(shell, "%specdec run --prompt x --max-new-tokens {n - 3} --config $config").wait()
    assert len(finished.tokens()[0]) <= 4
    assert finished.header.config == "ngram/chain3"


def test_a_semicolon_at_the_end_is_not_part_of_the_last_value(shell):
    run(shell, "%specdec run --prompt x --max-new-tokens 3;")
    live = magics_of(shell).lab.background["run"]
    assert sum(map(len, live.wait()[0].tokens())) <= 3


def test_json_gives_plain_data(shell):
    assert run(shell, "%specdec load --json")["target"]["runner"] == "fast"


def test_help_is_printed_and_nothing_is_run(shell, capsys):
    assert run(shell, "%specdec run -h") is None
    assert "usage: %specdec run" in capsys.readouterr().out
    assert run(shell, "%specdec --help") is None
    assert "status" in capsys.readouterr().out
    assert magics_of(shell).lab.engine is None
    assert "usage: %specdec" in magics.SpecdecMagics.specdec.__doc__


@pytest.fixture
def quick_tuning(monkeypatch):
    honest = tuning.make_plan
    quick = Protocol(race_run_s=1e-6, duel_run_s=1e-6, min_rounds=2, race_blocks=2, max_trials=1, busy_retries=0)
    small = {"protocol": quick, "windows": (32,), "chains": (2,)}
    monkeypatch.setattr(tuning, "make_plan", lambda *words, **options: honest(*words, **{**options, **small}))


def test_tuning_goes_on_behind_the_cell_and_its_policy_is_used_next(shell, quick_tuning, monkeypatch):
    monkeypatch.setenv("SPECDEC_DISPLAY", "static")
    live = run(shell, "%specdec tune --batches 1 --lengths 20,40 --budget 60s --db db")
    assert "tuning 2 cells of prose" in live.headline()
    policy = live.wait()
    assert isinstance(policy, Policy)
    assert Policy.load("policy.json").dumps() == policy.dumps()
    assert policy.headline() in live.headline()
    assert policy.headline() in live._repr_mimebundle_()["text/html"]
    assert run(shell, "%specdec policy show") is policy
    assert str(run(shell, "%specdec policy explain 1x30")).startswith("1x30: ")


def test_a_fault_of_a_tuning_reaches_whoever_waits_for_it(shell, quick_tuning, monkeypatch):
    def broken(self, cell):
        raise IndexError("a fault")

    monkeypatch.setattr(sessions.Sessions, "open", broken)
    live = run(shell, "%specdec tune --batches 1 --lengths 20 --db db")
    with pytest.raises(IndexError, match="a fault"):
        live.wait()
    assert "failed; IndexError: a fault" in live.headline()


def test_what_other_rooms_made_shows_itself_as_text_and_table(shell):
    made_policies.LOOKUP.save("policy.json")
    policy = run(shell, "%specdec policy show")
    shown, _ = shell.display_formatter.format(policy)
    assert shown["text/plain"].startswith("speculate in 2 of 2 feasible cells")
    assert "<table>" in shown["text/html"]
    assert "<style" not in shown["text/html"]
    exported = run(shell, "%specdec export policy.json --to vllm --length 512")
    assert "lost:" in shell.display_formatter.format(exported)[0]["text/plain"]
    explained = run(shell, "%specdec policy explain 2x512")
    assert shell.display_formatter.format(explained)[0]["text/plain"] == str(explained)


# Mistakes.


@pytest.mark.parametrize(("line", "words"), [
    ("%specdec", "the following arguments are required: VERB. See %specdec --help"),
    ("%specdec nope", "invalid choice: 'nope'"),
    ("%specdec profile --cells 1x20 --configs slef:4+60/chain3", "column 1: drafter 'slef' is none of"),
    ("%specdec run --prompt 'open", "No closing quotation in: run --prompt 'open"),
    ("%specdec run --prompt x --config model:snapkv64+8/2,2", "SnapKV chooses among the target's own keys"),
    ("%specdec profile --cells 1x9000 --configs off", "none of these cells can run"),
    ("%specdec policy show", "there is no policy.json here"),
    ("%specdec replay nowhere.jsonl", "there is no trace at nowhere.jsonl"),
    ("%specdec load --as 2x", "--as needs a variable name, got '2x'"),
    ("%specdec stop nothing", "nothing runs under the name 'nothing'"),
])
def test_a_mistake_is_one_line_without_traceback(shell, line, words, capsys):
    said = mistake(shell, line)
    assert words in said
    assert "\n" not in said
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert f"UsageError: {said}" in shown.out + shown.err


def test_a_fault_keeps_its_traceback(shell, monkeypatch):
    monkeypatch.setattr(sd.Engine, "steps", lambda *_: [][1])
    with pytest.raises(IndexError):
        run(shell, "%specdec run --prompt x")


# Behind the cells.


@pytest.fixture
def endless(shell, monkeypatch):
    """`run` becomes a stream that ends only when it is stopped."""
    honest = sd.Engine.steps

    def steps(self, workload, choose):
        stream = honest(self, workload, choose)
        last = list(stream)[-1]
        return paced(sd.Stream(stream.header, itertools.repeat(last)), speed=0.1)

    monkeypatch.setattr(sd.Engine, "steps", steps)
    return run(shell, "%specdec run --prompt x --max-new-tokens 2")


def test_stop_ends_what_runs_and_keeps_it(shell, endless):
    assert endless.is_alive
    assert str(run(shell, "%specdec stop")).startswith("stopping run at the next step")
    (finished,) = endless.wait()
    assert finished.interrupted
    endless.join(2.0)
    assert str(run(shell, "%specdec stop")) == "nothing is running"


def test_status_says_what_runs_and_which_engine(shell, endless):
    said = str(run(shell, "%specdec status"))
    assert "running" in said
    assert "%specdec stop" in said
    assert "engine: Engine(ModelPair('tiny'" in said
    endless.stop()


def test_two_measurements_at_a_time_are_refused_and_the_same_verb_replaces_its_run(shell, endless, monkeypatch):
    assert "run is still running and would disturb this measurement" in mistake(shell, f"%{PROFILE}")
    again = run(shell, "%specdec run --prompt x --max-new-tokens 2")
    assert not endless.is_alive
    assert again.is_alive
    again.stop()


def test_unloading_stops_runs_and_leaves_nothing_behind(shell, endless):
    assert own_threads()
    before = list(shell.Completer.custom_matchers)
    shell.extension_manager.unload_extension("specdec_lab")
    assert not endless.is_alive
    assert own_threads() == []
    assert "specdec" not in shell.magics_manager.magics["line"]
    assert "specdec" not in shell.magics_manager.magics["cell"]
    assert len(shell.Completer.custom_matchers) == len(before) - 1
    assert ("specdec_lab.policy.table", "Policy") not in shell.display_formatter.formatters["text/html"].deferred_printers
    shell.extension_manager.load_extension("specdec_lab")


def test_reloading_many_times_adds_nothing(shell):
    before = (len(shell.Completer.custom_matchers), own_threads())
    for _ in range(3):
        shell.extension_manager.reload_extension("specdec_lab")
    sd.load_ipython_extension(shell)
    assert (len(shell.Completer.custom_matchers), own_threads()) == before


def test_starting_again_and_again_leaves_no_threads(shell):
    for _ in range(3):
        run(shell, "%specdec run --prompt x --max-new-tokens 2").wait()
    magics_of(shell).close()
    assert own_threads() == []


def test_a_carried_error_is_held_and_not_raised():
    carried = background._Carried()
    with carried:
        raise KeyError("x")
    assert isinstance(carried.error, KeyError)


# Completion.


def completions(shell, line):
    with provisionalcompleter():
        return [c.text for c in shell.Completer.completions(line, len(line))]


def test_verbs_options_and_choices_are_completed(shell):
    assert {"run", "profile", "tune"} <= set(completions(shell, "%specdec "))
    assert "profile" in completions(shell, "%specdec pro")
    assert set(completions(shell, "%specdec profile --b")) == {"--blocks", "--block-seconds", "--backend"}
    assert completions(shell, "%specdec tune --dry") == ["--dry-run"]
    assert completions(shell, "%specdec profile --workload re") == ["revision"]
    assert set(completions(shell, "%specdec policy ")) >= {"show", "explain", "check"}
    assert "--config" in completions(shell, "%%specdec run --con")


def test_completion_leaves_other_lines_alone(shell):
    shell.user_ns["profiled"] = 1
    assert "profiled" in completions(shell, "profil")


# Loading.


def test_loading_the_extension_loads_neither_torch_nor_the_view():
    code = (
        "import sys\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "shell.extension_manager.load_extension('specdec_lab')\n"
        "shell.run_line_magic('specdec', 'run -h')\n"
        "heavy = {'torch', 'transformers', 'plotly', 'optuna', 'numpy', 'ipywidgets', 'anywidget'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("version", "said"), [("7.0.1", "cannot send from threads"), ("7.4.0", ""), ("6.31.0", "")])
def test_a_kernel_that_cannot_show_live_views_is_named_in_one_line(shell, monkeypatch, version, said, capsys):
    monkeypatch.setattr(magics.metadata, "version", lambda name: version)
    monkeypatch.setattr(type(shell), "kernel", object(), raising=False)
    magics.load(shell)
    out = capsys.readouterr().out
    assert said in out
    assert out.count("\n") == (1 if said else 0)
