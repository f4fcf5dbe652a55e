"""Remove one guard after the other: the test that stands for it has to fail.

    python tools/mutate.py [WORD ...]     only the guards whose name has one of the words

A guard is a statement of the package with a comment `# guard: NAME`; two on one line are parted by `|`. Removed, an `if`
never holds and any other statement is `pass`, unless GUARDS names what stands there instead. Works on a copy of the package and
the tests in a temporary folder. First every test runs on the unchanged copy, where it has to pass, so that a failure
later is the guard's. A test that is skipped shows nothing, and counts as not shown."""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("nash_lab", "tests", "tools", "nbs", "docs", "pyproject.toml", "settings.ini")
LIMIT = 300  # seconds for one test


class Guard(NamedTuple):
    test: str  # what has to fail without it
    instead: str = ""  # stands in place of the statement, or of the first line of a block


GUARDS = {
    "checkpoint: manifest": Guard("tests/test_faults.py::test_forty_bit_flips"),
    "checkpoint: early digests": Guard(
        "tests/test_faults.py::test_a_file_that_changes_after_it_was_hashed[rewritten]",
        "written = 0",
    ),
    "checkpoint: links": Guard("tests/test_faults.py::test_links_and_pipes[link to a file]"),
    "checkpoint: packed arrays": Guard(
        "tests/test_faults.py::test_a_file_that_unpacks_to_two_gigabytes"
    ),
    "checkpoint: fall-back": Guard(
        "tests/test_faults.py::test_damage_to_any_file[one bit]", "raise"
    ),
    "checkpoint: no fresh start": Guard(
        "tests/test_faults.py::test_all_damaged_is_no_fresh_start", "return bool(self.steps())"
    ),
    "checkpoint: rename first": Guard(
        "tests/test_faults.py::test_kill_at_each_deletion", "shutil.rmtree(folder)"
    ),
    "checkpoint: another tokenizer": Guard("tests/test_faults.py::test_another_tokenizer"),
    "checkpoint: home directory": Guard("tests/test_faults.py::test_no_secret_is_written"),
    "checkpoint: order by number": Guard(
        "tests/test_faults.py::test_clocks_do_not_matter",
        "steps.sort(key=lambda s: -(folder / str(s)).stat().st_mtime)",
    ),
    "checkpoint: the same folder": Guard("tests/test_faults.py::test_directory_gone_midway[lose]"),
    "run: another config": Guard("tests/test_faults.py::test_changed_config", "changes = []"),
    "run: cut line": Guard("tests/test_faults.py::test_line_cut_at_every_byte"),
    "run: home directory": Guard("tests/test_faults.py::test_no_secret_is_written"),
    "explore: no tag in the data": Guard("tests/test_explore.py::test_one_file"),
    "search: lost answers": Guard(
        "tests/test_ttt.py::test_lost_answers_are_counted_and_never_averaged",
        "known = np.ones(len(group), bool)",
    ),
    "evals: problems without a score": Guard(
        "tests/test_evals.py::test_bad_problems_end_no_evaluation"
    ),
    "run: another model to start from": Guard("tests/test_tune.py::test_refused_runs"),
    "run: lock": Guard("tests/test_faults.py::test_second_process_is_refused"),
    "run: signals": Guard("tests/test_faults.py::test_signal_saves_that_step[SIGTERM-data]"),
    "run: watchdog": Guard("tests/test_faults.py::test_hang_is_ended_and_explained"),
    "run: position": Guard("tests/test_faults.py::test_ten_stops"),
    "run: background saves": Guard("tests/test_faults.py::test_failed_save_is_made_up_for"),
    "numbers: bad steps": Guard(
        "tests/test_faults.py::test_bad_step_changes_nothing[one leaf]", "good = jnp.array(True)"
    ),
    "numbers: in a row": Guard("tests/test_faults.py::test_bad_steps_in_a_row_end_the_run[1]"),
    "numbers: saved state": Guard(
        "tests/test_faults.py::test_no_state_is_saved_that_is_not_finite"
    ),
    "data: share of broken records": Guard(
        "tests/test_data_faults.py::test_more_than_one_per_cent_of_broken_records_stops"
    ),
    "data: length of a record": Guard("tests/test_data_faults.py::test_a_limit_is_exact"),
    "data: memory of a record": Guard(
        "tests/test_data_faults.py::test_a_giant_line_is_refused_in_bounded_memory[jsonl-]"
    ),
    "data: text file that changes": Guard(
        "tests/test_data_faults.py::test_a_text_file_that_changes_is_an_error[rewrite]"
    ),
    "data: packed file that changes": Guard(
        "tests/test_data_faults.py::test_a_packed_file_that_changes_is_an_error_and_no_signal[rewrite]"
    ),
    "data: source that changes": Guard(
        "tests/test_data_faults.py::test_a_source_that_changes_is_an_error[append]",
        "for path, stamp in ():",
    ),
    "data: pass without documents": Guard(
        "tests/test_data_faults.py::test_blank_and_one_token_documents",
        "if docs.sources[i].epoch > 50:",
    ),
    "data: dead worker": Guard(
        "tests/test_data_faults.py::test_a_killed_worker_is_an_error_within_ten_seconds_and_no_batch_is_lost"
    ),
    "data: worker dead amid a message": Guard(
        "tests/test_data_faults.py::test_a_killed_worker_is_an_error_within_ten_seconds_and_no_batch_is_lost"
    ),
    "data: spelled special pieces": Guard(
        "tests/test_data_stream.py::test_a_tokenizer_json_in_place_of_sentencepiece",
        "model.encode_special_tokens = False",
    ),
    "data: end of document of the tokenizer": Guard(
        "tests/test_data_stream.py::test_stream_and_packed_file_give_the_same_batches",
        "ids = [*ids, EOS]",
    ),
    "data: memory of copies in a position": Guard(
        "tests/test_data_stream.py::test_the_rest_of_the_stream_is_exact_at_every_batch[mask]"
    ),
    "data: copies of an earlier pass": Guard(
        "tests/test_data_stream.py::test_epochs_are_counted_per_source", "if True:"
    ),
    "data: position with a byte order mark": Guard(
        "tests/test_data.py::test_a_position_in_text_read_with_its_byte_order_mark_is_of_another_stream"
    ),
    "data: length of a line in a stream": Guard(
        "tests/test_data_faults.py::test_a_giant_line_in_a_stream[jsonl-line-stream]"
    ),
    "data: hidden files": Guard(
        "tests/test_data_files.py::test_hidden_files_are_left_out_and_counted"
    ),
    "data: another encoding": Guard("tests/test_data_files.py::test_one_reader_for_every_text"),
    "data: byte order mark of a text": Guard(
        "tests/test_data.py::test_odd_text_files_in_a_stream", 'return data.decode("utf-8")'
    ),
    "data: type of a column": Guard(
        "tests/test_data_files.py::test_a_column_that_is_no_text_is_refused"
    ),
    "data: files without rows": Guard(
        "tests/test_data_faults.py::test_an_empty_file_is_no_source_and_no_obstacle"
    ),
    "data: no tokens": Guard(
        "tests/test_data.py::test_a_description_that_no_packed_file_can_have_is_refused"
    ),
    "data: format of packed tokens": Guard(
        "tests/test_data.py::test_a_description_that_no_packed_file_can_have_is_refused"
    ),
    "data: type of packed tokens": Guard(
        "tests/test_data.py::test_a_description_that_no_packed_file_can_have_is_refused"
    ),
    "data: length of packed tokens": Guard(
        "tests/test_data.py::test_a_file_of_another_length_is_refused"
    ),
    "data: ids beyond the vocabulary": Guard(
        "tests/test_data.py::test_an_id_beyond_the_vocabulary_is_refused"
    ),
    "data: a pipe as packed tokens": Guard(
        "tests/test_data.py::test_a_pipe_or_a_folder_is_no_packed_file_and_no_tokenizer[t.bin-pipe]"
    ),
    "data: a pipe as description": Guard(
        "tests/test_data.py::test_a_pipe_or_a_folder_is_no_packed_file_and_no_tokenizer[t.bin.json-pipe]"
    ),
    "data: a pipe as tokenizer": Guard(
        "tests/test_data.py::test_a_pipe_or_a_folder_is_no_packed_file_and_no_tokenizer[t.model-pipe]"
    ),
    "data: a pipe beside a tokenizer": Guard(
        "tests/test_data.py::test_a_pipe_or_a_folder_is_no_packed_file_and_no_tokenizer[tokenizer_config.json-pipe]",
        "if not path.exists():",
    ),
    "text: a piece without a row": Guard(
        "tests/test_foreign_tokenizers.py::test_a_larger_tokenizer_works_until_it_is_used",
        "if False:",
    ),
    "generate: ids beyond": Guard(
        "tests/test_generate.py::test_ids_without_a_piece_are_never_drawn", "nowhere = set()"
    ),
    "data: time of a run of spaces": Guard(
        "tests/test_data_faults.py::test_a_run_of_spaces_is_cleaned_in_one_pass",
        'spaces = r"[^\\S\\n]+$"',
    ),
    "data: a key given twice": Guard("tests/test_data.py::test_bad_json_lines"),
    "data: shards of an interrupted packing": Guard(
        "tests/test_shards.py::test_a_packing_that_dies_continues_to_the_byte[stream]"
    ),
    "data: another packing continued": Guard(
        "tests/test_shards.py::test_bad_use_is_one_line_and_loses_nothing"
    ),
    "data: shards of two packings": Guard(
        "tests/test_shards.py::test_shards_that_do_not_belong_together"
    ),
    "data: pieces without a row": Guard(
        "tests/test_shards.py::test_shards_that_do_not_belong_together"
    ),
    "data: borders without EOS": Guard("tests/test_shards.py::test_documents_without_an_end"),
    "data: end that a text can spell": Guard(
        "tests/test_foreign_tokenizers.py::test_a_sentencepiece_model_of_others[bpe]"
    ),
    "data: other stream": Guard(
        "tests/test_data_stream.py::test_a_position_of_another_stream_is_refused"
    ),
    "sandbox: network": Guard("tests/test_sandbox.py::test_attack[2-network]"),
    "sandbox: reading files": Guard("tests/test_sandbox.py::test_attack[2-read_files]"),
    "sandbox: writing files": Guard(
        "tests/test_sandbox.py::test_attack[1-write_files]", "WRITING = 0"
    ),
    "sandbox: early exit": Guard("tests/test_sandbox.py::test_leaving_early_is_no_pass"),
    "sandbox: nonce": Guard("tests/test_sandbox.py::test_attack[2-forgeries]"),
    "sandbox: children": Guard("tests/test_sandbox.py::test_attack[2-forks]"),
    "sandbox: environment": Guard(
        "tests/test_sandbox.py::test_attack[2-environment]", "env = os.environ | ENVIRONMENT"
    ),
    "sandbox: time": Guard(
        "tests/test_sandbox.py::test_attack[2-clock]",
        "deadline = time.monotonic() + limits.wall_s + 5",
    ),
    "sandbox: signals": Guard("tests/test_sandbox.py::test_attack[2u-signals]"),
    "hf: a tensor of another shape": Guard("tests/test_foreign_weights.py::test_refused[turned matrix]"),
    "hf: quantised weights": Guard("tests/test_foreign_weights.py::test_refused[awq scales]"),
    "hf: unknown mathematics": Guard("tests/test_foreign_weights.py::test_refused[softcap]"),
    "hf: layer types": Guard("tests/test_foreign_weights.py::test_refused[layer types]"),
    "hf: rotary keys": Guard("tests/test_foreign_weights.py::test_rotary_keys_that_are_refused"),
    "hf: two tensors for one weight": Guard("tests/test_foreign_weights.py::test_refused[one weight twice]"),
    "hf: two heads under one name": Guard(
        "tests/test_foreign_weights.py::test_a_tied_head_is_in_whichever_tensor_is_there"
    ),
    "lora: more than plain LoRA": Guard("tests/test_lora.py::test_refused_configs"),
    "lora: a missing layer": Guard("tests/test_refusals_adapt.py::test_adapter_with_a_block_missing"),
    "lora: a tensor without a layer": Guard("tests/test_lora.py::test_refused_configs"),
    "lora: one end of a table": Guard("tests/test_instruct.py::test_tables_both_ways[tied]"),
}


def marks(text: str) -> dict[str, int]:
    "{name: line} of the guards that a module marks."
    found = {}
    for i, line in enumerate(text.splitlines(), start=1):
        if "# guard: " in line:
            found.update({name.strip(): i for name in line.split("# guard: ")[1].split("|")})
    return found


def places(package: Path) -> dict[str, Path]:
    "{name: module} of every guard. ValueError when one is marked twice."
    found = {}
    for path in sorted(package.rglob("*.py")):
        for name in marks(path.read_text(encoding="utf-8")):
            if name in found:
                raise ValueError(f"guard {name!r} is marked in {found[name]} and in {path}")
            found[name] = path
    return found


def without(text: str, name: str, instead: str = "") -> str:
    "The source of a module after the guard `name` is removed."
    line = marks(text)[name]
    lines = text.splitlines()

    def last(node) -> int:  # line of a simple statement, or of the head of a block
        return node.body[0].lineno - 1 if hasattr(node, "body") else node.end_lineno

    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    node = max((n for n in statements if n.lineno <= line <= last(n)), key=lambda n: n.lineno)
    head = lines[node.lineno - 1]
    indent = head[: len(head) - len(head.lstrip())]
    word = head.split()[0]
    if not instead:
        instead = f"{word} False:" if word in ("if", "elif") else "pass"
    whole = not instead.endswith(":")
    end = node.end_lineno if whole else last(node)
    new = [indent + row for row in instead.splitlines()]
    return "\n".join(lines[: node.lineno - 1] + new + lines[end:]) + "\n"


def copy(folder: Path):
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)


def outcome(folder: Path, test: str) -> tuple[str, str]:
    "passed, failed or skipped, and the last line of pytest."
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", test]
    try:
        r = subprocess.run(
            run,
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return "failed", f"not done after {LIMIT} s"
    last = (r.stdout.strip().splitlines() or [r.stderr.strip()[-200:]])[-1].strip("= ")
    if r.returncode not in (0, 1):
        return "broken", last
    if r.returncode:
        return "failed", last
    return ("passed" if "passed" in last else "skipped"), last


def main(words) -> int:
    chosen = {
        name: guard for name, guard in GUARDS.items() if not words or any(w in name for w in words)
    }
    if not chosen:
        sys.exit(f"no guard has {words} in its name")
    shown = 0
    with tempfile.TemporaryDirectory(prefix="nash_lab-mutate-") as place:
        os.chmod(place, 0o755)  # a plain user reads it too
        folder = Path(place)
        copy(folder)
        files = places(folder / "nash_lab")
        for name, guard in chosen.items():
            said, why = outcome(folder, guard.test)
            if said != "passed":
                print(f"{name:<36} NOT SHOWN: its test is {said} with the guard: {why}", flush=True)
                continue
            before = files[name].read_text(encoding="utf-8")
            files[name].write_text(without(before, name, guard.instead), encoding="utf-8")
            said, why = outcome(folder, guard.test)
            files[name].write_text(before, encoding="utf-8")
            shown += said == "failed"
            print(
                f"{name:<36} removed: "
                + ("its test fails" if said == "failed" else f"NOT NOTICED: {why}"),
                flush=True,
            )
    print(f"{shown} of {len(chosen)} guards are missed when they are gone")
    return shown < len(chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
