"What the floor of data refuses: every value by its name, and every bad input with what was found."
import json
from dataclasses import replace
from pathlib import Path
import pytest
from nash_lab.data.corpus import CorpusConfig, Document, PackedTokens, documents, pack
from nash_lab.data.loader import LoaderConfig, eval_batches, loader
from nash_lab.data.tokenizer import HFTokenizer, SentencePieceTokenizer, TokenizerConfig, load_tokenizer, special_ids, train_tokenizer

SETTINGS = [
    (TokenizerConfig, dict(vocab_size=260)), (TokenizerConfig, dict(character_coverage=0.)), (TokenizerConfig, dict(character_coverage=1.1)),
    (TokenizerConfig, dict(max_text_bytes=-1)),
    (CorpusConfig, dict(source='csv')), (CorpusConfig, dict(source='text', paths=())), (CorpusConfig, dict(paths=('a.txt',))),
    (CorpusConfig, dict(holdout=1.)), (CorpusConfig, dict(holdout=-.1)), (CorpusConfig, dict(max_bytes=-1)), (CorpusConfig, dict(on_error='go on')),
    (LoaderConfig, dict(seq_len=0)), (LoaderConfig, dict(batch_size=0)), (LoaderConfig, dict(seed=-1)), (LoaderConfig, dict(seed=2**32)),
    (LoaderConfig, dict(epochs=-1)), (LoaderConfig, dict(prefetch=-1)), (LoaderConfig, dict(documents='cut')),
    (CorpusConfig, dict(max_bad_share=1.1)), (CorpusConfig, dict(max_record_bytes=0)),
]

@pytest.mark.parametrize('cls, values', SETTINGS, ids=lambda o: o.__name__ if isinstance(o, type) else ','.join(map(str, o)))
def test_a_setting_is_refused_by_name_and_value(cls, values):
    with pytest.raises(ValueError) as error: cls(**values)
    name, value = list(values.items())[-1]
    assert f'{cls.__name__}.{name}={value!r}' in str(error.value)

# ---- tokenizers

@pytest.fixture(scope='module')
def tok(tmp_path_factory):
    texts = [f'line {i} of a text with {i * 7} words\n' for i in range(300)]
    return train_tokenizer(texts, tmp_path_factory.mktemp('tok')/'tok.model', TokenizerConfig(vocab_size=320))

@pytest.mark.parametrize('texts, found', [([], 'no text'), (['too little'], 'vocab_size=32000'), (['half \udc00'], 'U+DC00')])
def test_a_failed_training_leaves_no_file(tmp_path, texts, found):
    with pytest.raises(ValueError, match='none.model|U\\+DC00') as error: train_tokenizer(texts, tmp_path/'none.model')
    assert found in str(error.value) and not list(tmp_path.iterdir())

@pytest.mark.parametrize('ids', [[320], [-1]])
def test_an_id_out_of_range_is_refused(tok, ids):
    with pytest.raises(ValueError, match=f'{ids[0]}.*320'): tok.decode(ids)

def test_what_is_no_tokenizer_is_refused(tmp_path):
    for path in ('vocab.txt', 'vocab'):
        with pytest.raises(ValueError, match=path): load_tokenizer(path)
    with pytest.raises(ValueError, match='not a SentencePiece model'): SentencePieceTokenizer(b'something else')
    with pytest.raises(ValueError, match='t.json: not a tokenizer.json'): HFTokenizer(b'{}', Path('t.json'))
    with pytest.raises(ValueError, match='ends a document'): special_ids(None, {'a': 0})

def test_a_named_special_piece_has_to_be_there(tmp_path):
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({'a': 0, '</s>': 1, '[UNK]': 2}, unk_token='[UNK]')).save(str(tmp_path/'tokenizer.json'))
    hf = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match='begins a text'): hf.encode('a', bos=True)
    with pytest.raises(ValueError, match='3.*vocabulary of 3'): hf.decode([3])
    (tmp_path/'tokenizer_config.json').write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(ValueError, match='<|end|>'): load_tokenizer(tmp_path)

# ---- packed files

def test_nothing_to_pack_is_an_error_and_no_file(tmp_path, tok):
    (tmp_path/'a.txt').write_text('one document, which is train')
    cfg = CorpusConfig('text', (str(tmp_path/'a.txt'),))
    with pytest.raises(ValueError, match='none.bin.*no documents.*validation'): pack(documents(cfg, 'validation'), tok, tmp_path/'none.bin', split='validation')
    assert not (tmp_path/'none.bin').exists()
    with pytest.raises(ValueError, match="split='test'"): next(documents(cfg, 'test'))

DAMAGE = {  # what happens to the file, to its description -> what the message holds
    'one bit': (lambda data: bytes([data[0] ^ 1]) + data[1:], {}, 'not the file that was packed'), 'cut': (lambda data: data[:-3], {}, 'bytes, expected'),
    'an id': (lambda data: b'\x40\x01' + data[2:], {}, 'id 320 at token 0, expected ids below 320'),
    'smaller vocabulary': (lambda data: data, dict(vocab_size=270), 'expected ids below 270'), 'type': (lambda data: data, dict(tokens='9'), "PackedMeta.tokens"),
    'no description': (lambda data: data, None, 't.bin.json: missing'), 'no file': (None, {}, 'no packed tokens here')}

@pytest.mark.parametrize('data, about, found', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_packed_file_is_refused(tmp_path, tok, data, about, found):
    path, said = tmp_path/'t.bin', tmp_path/'t.bin.json'
    pack((Document(f'row {i}', 'made') for i in range(99)), tok, path)
    if data: path.write_bytes(data(path.read_bytes()))
    else: path.unlink()
    if about is None: said.unlink()
    else: said.write_text(json.dumps(json.loads(said.read_text()) | about))
    with pytest.raises((ValueError, FileNotFoundError), match=found): PackedTokens.open(path)

def test_a_file_for_another_tokenizer_is_refused(tmp_path, tok):
    pack([Document('row', 'made')], tok, tmp_path/'t.bin')
    with pytest.raises(ValueError, match='tokenizer_hash.*another'): PackedTokens.open(tmp_path/'t.bin', tokenizer_hash='another')
    with pytest.raises(ValueError, match='vocab_size 320, expected 256'): PackedTokens.open(tmp_path/'t.bin', vocab_size=256)

# ---- positions and shares

@pytest.fixture(scope='module')
def packed(tok, tmp_path_factory):
    path = tmp_path_factory.mktemp('packed')/'t.bin'
    pack((Document(f'row {i}', 'made') for i in range(99)), tok, path)
    return PackedTokens.open(path)

CFG = LoaderConfig(seq_len=8, batch_size=4, epochs=3)

@pytest.mark.parametrize('how, found', [(dict(shards=3), 'batch_size=4.*shards=3'), (dict(shard=2, shards=2), 'shard=2'), (dict(shard=-1), 'shard=-1')])
def test_a_batch_that_cannot_be_shared_is_refused(packed, how, found):
    with pytest.raises(ValueError, match=found): loader(packed, CFG, **how)

def test_a_position_beyond_the_end_or_of_nothing_is_refused(packed):
    run = loader(packed, CFG)
    state = run.get_state()
    for batch in (-1, run.batches + 1, None, '1'):
        with pytest.raises(ValueError, match=f'batch {batch!r}'): run.set_state(state | dict(batch=batch))
    with pytest.raises(ValueError, match='sha256 None'): run.set_state({})
    with pytest.raises(ValueError, match='expected at least 2'): next(eval_batches(replace(packed, tokens=packed.tokens[:1]), 8, 4))
