"""Remove one guard after the other: the test that stands for it has to fail.

    python tools/mutate.py [WORD ...]     only the mutations whose name has one of the words

Works on a copy of the package and the tests in a temporary folder; the checkout is never touched. First every test runs on the unchanged copy, where
it has to pass, so that a failure later is the guard's. A test that is skipped shows nothing, and counts as not shown."""

import os, shutil, subprocess, sys, tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ('nash_lab', 'tests', 'tools', 'nbs', 'docs', 'pyproject.toml', 'settings.ini')
LIMIT = 300  # seconds for one test


class Mutation(NamedTuple):
    name: str  # page: guard
    file: str  # in the package
    old: str  # stands there exactly once
    new: str  # the same without the guard
    test: str  # what has to fail


TRAIN, FAULT = 'nash_lab/train', 'tests/test_faults.py::test'
CONFINE, SANDBOX, ATTACK = (
    'nash_lab/evals/confine.py',
    'nash_lab/evals/sandbox.py',
    'tests/test_sandbox.py::test_attack',
)
DATA, FAULTS, STREAM = 'nash_lab/data', 'tests/test_data_faults.py::test', 'tests/test_data_stream.py::test'
MUTATIONS = [
    Mutation(
        'checkpoint: manifest',
        f'{TRAIN}/checkpoint.py',
        '            if want[name][key] != value:',
        '            if False:',
        f'{FAULT}_forty_bit_flips',
    ),
    Mutation(
        'checkpoint: early digests',
        f'{TRAIN}/checkpoint.py',
        'about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns',
        'about.st_dev, about.st_ino, about.st_size',
        f'{FAULT}_a_file_that_changes_after_it_was_hashed[rewritten]',
    ),
    Mutation(
        'checkpoint: links',
        f'{TRAIN}/checkpoint.py',
        'if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)): raise',
        'if False: raise',
        f'{FAULT}_links_and_pipes[link to a file]',
    ),
    Mutation(
        'checkpoint: packed arrays',
        f'{TRAIN}/checkpoint.py',
        '    refuse_packed(source)\n',
        '',
        f'{FAULT}_a_file_that_unpacks_to_two_gigabytes',
    ),
    Mutation(
        'checkpoint: fall-back',
        f'{TRAIN}/checkpoint.py',
        'for step in reversed(numbered(folder)):',
        'for step in numbered(folder)[-1:]:',
        f'{FAULT}_damage_to_any_file[one bit]',
    ),
    Mutation(
        'checkpoint: no fresh start',
        f'{TRAIN}/checkpoint.py',
        '        return bool(numbered(self.folder))',
        '        return bool(self.steps())',
        f'{FAULT}_all_damaged_is_no_fresh_start',
    ),
    Mutation(
        'checkpoint: rename first',
        f'{TRAIN}/checkpoint.py',
        '    with suppress(OSError): os.rename(folder, gone)\n    shutil.rmtree(gone, ignore_errors=True)',
        '    shutil.rmtree(folder)',
        f'{FAULT}_kill_at_each_deletion',
    ),
    Mutation(
        'checkpoint: another tokenizer',
        f'{TRAIN}/checkpoint.py',
        '    check_facts(manifest, facts or {}, source)\n',
        '',
        f'{FAULT}_another_tokenizer',
    ),
    Mutation(
        'checkpoint: home directory',
        f'{TRAIN}/checkpoint.py',
        '            _empty_marks(partial)\n',
        '',
        f'{FAULT}_no_secret_is_written',
    ),
    Mutation(
        'checkpoint: order by number',
        f'{TRAIN}/checkpoint.py',
        'for step in reversed(numbered(folder)):',
        'for step in sorted(numbered(folder), key=lambda s: -(folder / str(s)).stat().st_mtime):',
        f'{FAULT}_clocks_do_not_matter',
    ),
    Mutation(
        'checkpoint: the same folder',
        f'{TRAIN}/checkpoint.py',
        '    if place == _place(folder): return\n',
        '    return\n',
        f'{FAULT}_directory_gone_midway[lose]',
    ),
    Mutation(
        'run: another config',
        f'{TRAIN}/config.py',
        '    if changes and not cfg.allow_changes:',
        '    if False:',
        f'{FAULT}_changed_config',
    ),
    Mutation(
        'run: cut line',
        f'{TRAIN}/rundir.py',
        'enumerate(lines[:-1], start=1)',
        'enumerate(filter(None, lines), start=1)',
        f'{FAULT}_line_cut_at_every_byte',
    ),
    Mutation(
        'run: home directory',
        f'{TRAIN}/guard.py',
        '.replace(str(Path.home()), "~")',
        '',
        f'{FAULT}_no_secret_is_written',
    ),
    Mutation(
        'search: lost answers',
        'nash_lab/discover/ttt.py',
        '    gained[kept], beta = ESTIMATORS[cfg.parts.estimator](rewards[kept])',
        '    gained, beta = ESTIMATORS[cfg.parts.estimator](rewards)',
        'tests/test_ttt.py::test_lost_answers_are_counted_and_never_averaged',
    ),
    Mutation(
        'run: lock',
        f'{TRAIN}/guard.py',
        '    try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)',
        '    try: pass',
        f'{FAULT}_second_process_is_refused',
    ),
    Mutation(
        'run: signals',
        f'{TRAIN}/guard.py',
        'self._note) for n in (signal.SIGTERM, signal.SIGINT)}',
        'self._note) for n in ()}',
        f'{FAULT}_signal_saves_that_step[SIGTERM-data]',
    ),
    Mutation(
        'run: watchdog',
        f'{TRAIN}/guard.py',
        'if still > (self.watchdog_s or math.inf): hang',
        'if False: hang',
        f'{FAULT}_hang_is_ended_and_explained',
    ),
    Mutation(
        'run: position',
        f'{TRAIN}/pretrain.py',
        '    try: batches.set_state(own_position(got["data"], jax.process_index(), jax.process_count()))',
        '    try: pass',
        f'{FAULT}_ten_stops',
    ),
    Mutation(
        'run: background saves',
        f'{TRAIN}/pretrain.py',
        '            made_up_for(job, job.checkpoints.poll)  # never waits',
        '            pass',
        f'{FAULT}_failed_save_is_made_up_for',
    ),
    Mutation(
        'numbers: bad steps',
        f'{TRAIN}/step.py',
        'good = jnp.isfinite(loss) & jnp.isfinite(norm)',
        'good = jnp.array(True)',
        f'{FAULT}_bad_step_changes_nothing[one leaf]',
    ),
    Mutation(
        'numbers: in a row',
        f'{TRAIN}/pretrain.py',
        'if not cfg.max_bad_steps or job.bad < cfg.max_bad_steps: return',
        'return',
        f'{FAULT}_bad_steps_in_a_row_end_the_run[1]',
    ),
    Mutation(
        'numbers: saved state',
        f'{TRAIN}/pretrain.py',
        '    if not all_finite((job.state.params, job.state.opt_state)):',
        '    if False:',
        f'{FAULT}_no_state_is_saved_that_is_not_finite',
    ),
    Mutation(
        'data: share of broken records',
        f'{DATA}/corpus.py',
        'if self.bad > share * self.records:',
        'if False:',
        f'{FAULTS}_more_than_one_per_cent_of_broken_records_stops',
    ),
    Mutation(
        'data: length of a record',
        f'{DATA}/corpus.py',
        'if len(raw) > cfg.max_record_bytes: raise',
        'if False: raise',
        f'{FAULTS}_a_limit_is_exact',
    ),
    Mutation(
        'data: memory of a record',
        f'{DATA}/corpus.py',
        'if len(rest) > limit + len(separator) + size:',
        'if False:',
        f'{FAULTS}_a_giant_line_is_refused_in_bounded_memory[jsonl-]',
    ),
    Mutation(
        'data: text file that changes',
        f'{DATA}/corpus.py',
        'if [now.st_mtime_ns, now.st_ino] != rest:',
        'if False:',
        f'{FAULTS}_a_text_file_that_changes_is_an_error[rewrite]',
    ),
    Mutation(
        'data: packed file that changes',
        f'{DATA}/corpus.py',
        'if now != self.stamp:',
        'if False:',
        f'{FAULTS}_a_packed_file_that_changes_is_an_error_and_no_signal[rewrite]',
    ),
    Mutation(
        'data: source that changes',
        f'{DATA}/corpus.py',
        '    for path, (size, *rest) in before.items():',
        '    for path, (size, *rest) in ():',
        f'{FAULTS}_a_source_that_changes_is_an_error[append]',
    ),
    Mutation(
        'data: pass without documents',
        f'{DATA}/stream.py',
        'if (last and docs.kept[i] < 0) or docs.sources[i].epoch > docs.kept[i] + 1:',
        'if docs.sources[i].epoch > 50: raise StopIteration\n    if False:',
        f'{FAULTS}_blank_and_one_token_documents',
    ),
    Mutation(
        'data: dead worker',
        f'{DATA}/stream.py',
        'if "exit code" not in str(error): raise',
        'raise',
        f'{FAULTS}_a_killed_worker_is_an_error_within_ten_seconds_and_no_batch_is_lost',
    ),
    Mutation(
        'data: spelled special pieces',
        f'{DATA}/tokenizer.py',
        'model.encode_special_tokens = True',
        'model.encode_special_tokens = False',
        f'{STREAM}_a_tokenizer_json_in_place_of_sentencepiece',
    ),
    Mutation(
        'data: end of document of the tokenizer',
        f'{DATA}/corpus.py',
        '[*ids, tokenizer.eos_id]',
        '[*ids, EOS]',
        f'{STREAM}_stream_and_packed_file_give_the_same_batches',
    ),
    Mutation(
        'data: memory of copies in a position',
        f'{DATA}/stream.py',
        'restored(self.filter.memory, log, state["logged"])',
        'pass',
        f'{STREAM}_the_rest_of_the_stream_is_exact_at_every_batch[mask]',
    ),
    Mutation(
        'data: copies of an earlier pass',
        f'{DATA}/filters.py',
        'if owner == here or owner[:2] != here[:2]: return True',
        'return True',
        f'{STREAM}_epochs_are_counted_per_source',
    ),
    Mutation(
        'data: a byte that is not UTF-8 in a line',
        f'{DATA}/sources.py',
        '(BAD, error.end)',
        '("?", error.end)',
        'tests/test_data.py::test_bad_json_lines_in_a_stream',
    ),
    Mutation(
        'data: a byte that is not UTF-8 in a text',
        f'{DATA}/sources.py',
        '(BAD, error.end)',
        '("?", error.end)',
        'tests/test_data.py::test_odd_text_files_in_a_stream',
    ),
    Mutation(
        'data: the encoding of text',
        f'{DATA}/sources.py',
        'dict(sample_by=unit, encoding="nash_lab")',
        'dict(sample_by=unit)',
        'tests/test_data.py::test_odd_text_files_in_a_stream',
    ),
    Mutation(
        'data: byte order mark of a text',
        f'{DATA}/sources.py',
        'codecs.getincrementaldecoder("utf-8-sig")',
        'codecs.getincrementaldecoder("utf-8")',
        'tests/test_data.py::test_odd_text_files_in_a_stream',
    ),
    Mutation(
        'data: position with a byte order mark',
        f'{DATA}/sources.py',
        '"text": "without byte order mark"',
        '"text": ""',
        'tests/test_data.py::test_a_position_in_text_read_with_its_byte_order_mark_is_of_another_stream',
    ),
    Mutation(
        'data: length of a line in a stream',
        f'{DATA}/sources.py',
        'kept.append(mark if long else data[at:end])',
        'kept.append(data[at:end])',
        f'{FAULTS}_a_giant_line_in_a_stream[jsonl-line-stream]',
    ),
    Mutation(
        'data: memory of a line in a stream',
        f'{DATA}/sources.py',
        'self.held += data[end:end + MAX_LINE + 1 - len(self.held)]',
        'self.held += data[end:]',
        f'{FAULTS}_a_giant_line_in_a_stream[jsonl-line-stream]',
    ),
    Mutation(
        'data: reading ahead in a line',
        f'{DATA}/sources.py',
        'if 2 * len(self.text) < len(data) and not final: return ""',
        'if False: return ""',
        f'{FAULTS}_a_giant_line_in_a_stream[jsonl-line-stream]',
    ),
    Mutation(
        'data: files without rows',
        f'{DATA}/sources.py',
        'if found and not any(size for size, *_ in found.values()):',
        'if False:',
        f'{FAULTS}_an_empty_file_is_no_source_and_no_obstacle',
    ),
    Mutation(
        'data: no tokens',
        f'{DATA}/corpus.py',
        'if getattr(self, name) < 1: raise',
        'if False: raise',
        'tests/test_data.py::test_a_description_that_no_packed_file_can_have_is_refused',
    ),
    Mutation(
        'data: format of packed tokens',
        f'{DATA}/corpus.py',
        'if self.version != 1: raise',
        'if False: raise',
        'tests/test_data.py::test_a_description_that_no_packed_file_can_have_is_refused',
    ),
    Mutation(
        'data: type of packed tokens',
        f'{DATA}/corpus.py',
        'if self.dtype != (fits := id_dtype(self.vocab_size)):',
        'if (fits := "") == 1:',
        'tests/test_data.py::test_a_description_that_no_packed_file_can_have_is_refused',
    ),
    Mutation(
        'data: length of packed tokens',
        f'{DATA}/corpus.py',
        '        if size != expected:',
        '        if False:',
        'tests/test_data.py::test_a_file_of_another_length_is_refused',
    ),
    Mutation(
        'data: ids beyond the vocabulary',
        f'{DATA}/corpus.py',
        'if ids.max() >= meta.vocab_size:',
        'if False:',
        'tests/test_data.py::test_an_id_beyond_the_vocabulary_is_refused',
    ),
    Mutation(
        'data: a pipe as packed tokens',
        f'{DATA}/corpus.py',
        'if not path.is_file(): raise',
        'if not path.exists(): raise',
        'tests/test_data.py::test_a_pipe_or_a_folder_is_no_packed_file_and_no_tokenizer[t.bin-pipe]',
    ),
    Mutation(
        'data: a pipe as description',
        f'{DATA}/corpus.py',
        'if not description.is_file(): raise',
        'if not description.exists(): raise',
        'tests/test_data.py::test_a_pipe_or_a_folder_is_no_packed_file_and_no_tokenizer[t.bin.json-pipe]',
    ),
    Mutation(
        'data: a pipe as tokenizer',
        f'{DATA}/tokenizer.py',
        'if not Path(path).is_file(): raise',
        'if not Path(path).exists(): raise',
        'tests/test_data.py::test_a_pipe_or_a_folder_is_no_packed_file_and_no_tokenizer[t.model-pipe]',
    ),
    Mutation(
        'data: a pipe beside a tokenizer',
        f'{DATA}/tokenizer.py',
        'if beside and beside.is_file() else {}',
        'if beside and beside.exists() else {}',
        'tests/test_data.py::test_a_pipe_or_a_folder_is_no_packed_file_and_no_tokenizer[tokenizer_config.json-pipe]',
    ),
    Mutation(
        'data: time of a run of spaces',
        f'{DATA}/filters.py',
        '(?<![^\\S\\n])',
        '',
        f'{FAULTS}_a_run_of_spaces_is_cleaned_in_one_pass',
    ),
    Mutation(
        'data: a key given twice',
        f'{DATA}/corpus.py',
        'if twice: raise',
        'if False: raise',
        'tests/test_data.py::test_bad_json_lines',
    ),
    Mutation(
        'data: other stream',
        f'{DATA}/stream.py',
        '        refuse_other(self.stream, state)\n',
        '',
        f'{STREAM}_a_position_of_another_stream_is_refused',
    ),
    Mutation(
        'sandbox: network',
        CONFINE,
        '"network": "socket 41 198 connect 42 203 bind 49 200"',
        '"network": ""',
        f'{ATTACK}[2-network]',
    ),
    Mutation(
        'sandbox: reading files',
        CONFINE,
        'if readable is not None: landlock(readable)',
        'pass',
        f'{ATTACK}[2-read_files]',
    ),
    Mutation(
        'sandbox: writing files',
        CONFINE,
        'WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000',
        'WRITING = 0',
        f'{ATTACK}[1-write_files]',
    ),
    Mutation(
        'sandbox: early exit',
        SANDBOX,
        '''if kept["result"].count(b"\\n") < 2 or code:''',
        '''if not code and kept["result"].count(b"\\n") < 2: return dict(status="passed", error="", values=())
    if kept["result"].count(b"\\n") < 2 or code:''',
        'tests/test_sandbox.py::test_leaving_early_is_no_pass',
    ),
    Mutation(
        'sandbox: nonce',
        SANDBOX,
        'if verdict.pop("nonce") != nonce: raise',
        'if verdict.pop("nonce") is None: raise',
        f'{ATTACK}[2-forgeries]',
    ),
    Mutation(
        'sandbox: children',
        CONFINE,
        '"children": "fork 57 - vfork 58 - execve 59 221 execveat 322 281"',
        '"children": ""',
        f'{ATTACK}[2-forks]',
    ),
    Mutation(
        'sandbox: environment',
        SANDBOX,
        'env=_ENVIRONMENT, pass_fds',
        'env=os.environ | _ENVIRONMENT, pass_fds',
        f'{ATTACK}[2-environment]',
    ),
    Mutation(
        'sandbox: time',
        SANDBOX,
        'deadline = time.monotonic() + limits.wall_s',
        'deadline = time.monotonic() + limits.wall_s + 5',
        f'{ATTACK}[2-clock]',
    ),
    Mutation(
        'sandbox: signals',
        CONFINE,
        'for number in (kill, tgkill): code += only_if(number, 0, EQUAL, pid, True)',
        'pass',
        f'{ATTACK}[2u-signals]',
    ),
]


def copy(folder: Path):
    for name in COPIED:
        ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)


def outcome(folder: Path, test: str) -> tuple[str, str]:
    "passed, failed or skipped, and the last line of pytest"
    env = os.environ | {'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1'}
    run = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-m', '', test]
    try:
        r = subprocess.run(
            run, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return 'failed', f'not done after {LIMIT} s'
    last = (r.stdout.strip().splitlines() or [r.stderr.strip()[-200:]])[-1].strip('= ')
    if r.returncode not in (0, 1):
        return 'broken', last
    return 'failed' if r.returncode else 'passed' if 'passed' in last else 'skipped', last


def mutate(folder: Path, m: Mutation) -> str:
    "The file's text before, after writing the mutated one. ValueError when the guard does not stand there exactly once"
    text = (folder / m.file).read_text(encoding='utf-8')
    if text.count(m.old) != 1:
        raise ValueError(f'{m.name}: {m.file} has {text.count(m.old)} times {m.old!r}, expected once')
    (folder / m.file).write_text(text.replace(m.old, m.new), encoding='utf-8')
    return text


def main(words) -> int:
    chosen = [m for m in MUTATIONS if not words or any(w in m.name for w in words)]
    if not chosen:
        sys.exit(f'no mutation has {words} in its name')
    missed = 0
    with tempfile.TemporaryDirectory(prefix='nash_lab-mutate-') as place:
        os.chmod(place, 0o755)  # a plain user reads it too
        copy(folder := Path(place))
        for m in chosen:
            with_guard, why = outcome(folder, m.test)
            if with_guard == 'passed':
                before = mutate(folder, m)
                without, why = outcome(folder, m.test)
                (folder / m.file).write_text(before, encoding='utf-8')
            shown = with_guard == 'passed' and without == 'failed'
            missed += not shown
            said = (
                'its test fails'
                if shown
                else f'NOT SHOWN, {with_guard} with the guard: {why}'
                if with_guard != 'passed'
                else f'NOT NOTICED: {why}'
            )
            print(f'{m.name:<28} removed: {said}', flush=True)
    print(f'{len(chosen) - missed} of {len(chosen)} guards are missed when they are gone')
    return missed > 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
