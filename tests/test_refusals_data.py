"What the floor of data refuses: every value by its name, and every bad input with what was found."
import json
from dataclasses import replace
from pathlib import Path
import pytest
from nash_lab.data.tokenizer import HFTokenizer, SentencePieceTokenizer, TokenizerConfig, load_tokenizer, special_ids, train_tokenizer

SETTINGS = [
    (TokenizerConfig, dict(vocab_size=260)), (TokenizerConfig, dict(character_coverage=0.)), (TokenizerConfig, dict(character_coverage=1.1)),
    (TokenizerConfig, dict(max_text_bytes=-1)),
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
