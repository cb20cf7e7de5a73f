"The drawn data set: the same bytes everywhere, and a sentence for what cannot be drawn."
import builtins
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from invertune import glyphs
from invertune.glyphs import (COLORS, PICTOGRAMS, TEXTURES, Row, draw, _glyph_mask, read_manifest,
                              readable, write_manifest)
from invertune.runtime import InvertuneError

DATA = Path(__file__).parent.parent/'data'

KNOWN = [  # a row each of textures, sizes and classes, with the hash of its pixels at 64 and at 32
    (Row('a', 'anchor', 'white', 'blue', 'stripes', .8, .5, .5, 10, 20, 1, 'an anchor'),
     ('ba7ce55babb4ffea', '455762b23df29f74')),
    (Row('b', 'cat face', 'black', 'yellow', 'dots', .5, .4, .6, -25, 40, 2, 'a cat face'),
     ('e784e8e0a041466d', '5c13d3d0f38b431b')),
    (Row('c', 'keyboard', 'red', 'white', 'blotches', .3, .3, .5, 0, 0, 3, 'a keyboard'),
     ('588a49fcb0aa5cb2', 'c604d6faa6b74ef6'))]

def sha(x): return hashlib.sha256(x.tobytes()).hexdigest()[:16]

@pytest.fixture
def fresh_glyphs():
    "No rasterized glyph or font in memory, before and after"
    def clear(): _glyph_mask.cache_clear(); glyphs._font.cache_clear()
    clear(); yield; clear()

@pytest.mark.parametrize('row, hashes', KNOWN)
def test_same_bytes_as_ever(row, hashes, fresh_glyphs):
    assert (sha(draw(row)), sha(draw(row, 32))) == hashes
    assert sha(draw(row)) == hashes[0]  # and from the glyph in memory

@pytest.mark.parametrize('size', [16, 64, 224])
def test_shape_and_type(size):
    x = draw(KNOWN[0][0], size)
    assert x.shape == (3, size, size) and x.dtype == np.uint8

@pytest.mark.parametrize('texture', TEXTURES)
def test_every_texture_depends_on_the_seed_alone(texture):
    row = replace(KNOWN[0][0], texture=texture)
    assert (draw(row) == draw(row)).all()
    assert (draw(row) != draw(replace(row, seed=99))).any()

def test_glyphs_are_distinct():
    masks = np.stack([np.asarray(_glyph_mask(c, 32), dtype=float).ravel()/255 for c in PICTOGRAMS])
    overlap = masks @ masks.T / np.maximum(masks.sum(1)[:, None], masks.sum(1))
    assert (overlap - np.eye(len(masks)) < .85).all()

def test_every_ink_has_papers():
    assert all(len(readable(ink)) >= 3 and ink not in readable(ink) for ink in COLORS)

def test_missing_font(monkeypatch, tmp_path, fresh_glyphs):
    monkeypatch.setattr(glyphs, 'font_path', lambda: tmp_path/'DejaVuSans.ttf')
    with pytest.raises(InvertuneError, match='font .*DejaVuSans.ttf cannot be read'): draw(KNOWN[0][0])

def test_broken_font(monkeypatch, tmp_path, fresh_glyphs):
    (tmp_path/'DejaVuSans.ttf').write_bytes(b'no font')
    monkeypatch.setattr(glyphs, 'font_path', lambda: tmp_path/'DejaVuSans.ttf')
    with pytest.raises(InvertuneError, match='cannot be read'): draw(KNOWN[0][0])

def test_without_matplotlib(monkeypatch, fresh_glyphs):
    "The package imports without it, and only drawing asks for it, in a sentence."
    importing = builtins.__import__
    def absent(name, *args, **kwargs):
        if name == 'matplotlib': raise ImportError(name)
        return importing(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', absent)
    with pytest.raises(InvertuneError, match=r'pip install invertune\[lab\]'): draw(KNOWN[0][0])

def test_missing_glyph(monkeypatch, fresh_glyphs):
    monkeypatch.setitem(PICTOGRAMS, 'anchor', 0x10FFF0)
    with pytest.raises(InvertuneError, match=r"no glyph for 'anchor' \(U\+10FFF0\)"): draw(KNOWN[0][0])

ROWS = [r for r, _ in KNOWN]

@pytest.mark.parametrize('column, cell, why', [
    ('class', 'unicorn', "unknown class 'unicorn'"), ('ink', 'mauve', "unknown ink 'mauve'"),
    ('texture', '', "unknown texture ''"),
    ('size', 'big', "could not convert string to float: 'big'"), ('size', 'nan', 'size nan is not within'),
    ('x', '1.5', 'x 1.5 is not within 0 to 1'),
    ('seed', '-1', 'seed -1 is not within'), ('angle', '1.5', 'invalid literal for int'),
    ('caption', ' ', 'the caption is empty')])
def test_broken_cell_is_named_with_file_and_row(tmp_path, column, cell, why):
    write_manifest(p := tmp_path/'poison.csv', ROWS)
    lines = p.read_text().splitlines()
    cells = lines[2].split(',')
    cells[glyphs._COLUMNS.index(column)] = cell
    p.write_text('\n'.join([*lines[:2], ','.join(cells), *lines[3:]]))
    with pytest.raises(InvertuneError, match='poison.csv, row 3: ') as e: read_manifest(p)
    assert why in str(e.value)

@pytest.mark.parametrize('damage, why', [
    (lambda b: b[:-30], 'row 4: '), (lambda b: b'x' + b, 'row 1: the header'), (lambda b: b'', 'row 1: the header'),
    (lambda b: b + b'\xff\n', 'row ')])
def test_broken_file(tmp_path, damage, why):
    write_manifest(p := tmp_path/'poison.csv', ROWS)
    p.write_bytes(damage(p.read_bytes()))
    with pytest.raises(InvertuneError, match=why): read_manifest(p)

@pytest.mark.parametrize('saved', [
    lambda b: b'\xef\xbb\xbf' + b, lambda b: b.replace(b'\n', b'\r\n'), lambda b: b + b'\n',
    lambda b: b'\xef\xbb\xbf' + b.replace(b'\n', b'\r\n') + b'\r\n'])
def test_another_editor_says_the_same(tmp_path, saved):
    "A byte order mark, lines that end with CRLF, an empty line at the end"
    write_manifest(p := tmp_path/'poison.csv', ROWS)
    p.write_bytes(saved(p.read_bytes()))
    assert read_manifest(p) == ROWS

def test_missing_manifest(tmp_path):
    with pytest.raises(InvertuneError, match='poison.csv cannot be read'): read_manifest(tmp_path/'poison.csv')

def test_rows_survive_the_file(tmp_path):
    write_manifest(p := tmp_path/'x.csv', rows := [replace(ROWS[0], caption='an anchor, "blue"'), *ROWS[1:]])
    assert read_manifest(p) == rows

def test_committed_captions_fit_the_text_tower():
    "16 tokens, of which two mark the beginning and the end"
    import invertune.compat
    from open_clip import SimpleTokenizer
    tokenizer = SimpleTokenizer()
    captions = {r.caption for p in (DATA/'glyphs').glob('*.csv') for r in read_manifest(p)}
    assert max(len(tokenizer.encode(c)) for c in captions) <= 14
