"A report is read by people and by programs: everything from the input is text, nothing comes from elsewhere, it is whole."
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from conftest import limit_of, verdict_of

from invertune import report as module
from invertune.report import Report, _check_folder, _facts, _how_sure, _model_card, _page, _png
from invertune.runtime import InvertuneError

NASTY = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'; drop", '&lt;b&gt;', '犬 café \u202e', 'x'*200]


def says(sentence): return pytest.raises(InvertuneError, match=sentence)


def make(backdoored=True, names=NASTY, cleaning=None, model='<script>model.pt'):
    "A report of made-up numbers."
    shares = torch.tensor([.9, *[.1/(len(names)-1)]*(len(names)-1)]).tolist()
    verdict = verdict_of(names, [9.8 if backdoored else .8, .5, 0., -.5, -1., .2][:len(names)])
    rows = [{'class': n, 'clean': 1/len(names), 'triggered': s if backdoored else None} for n, s in zip(names, shares)]
    controls = [{'class': n, 'target': i == 0, 'asr': s} for i, (n, s) in enumerate(zip(names, shares))] if backdoored else []
    picture = _png(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)))
    samples = [dict(clean=picture, triggered=picture, read=names[1], read_triggered=names[0])]*6 if backdoored else []
    opened = [dict(setting='<i>mean', value=[.5, .25, 1], origin='the tag <u> of open_clip'), dict(setting='QuickGELU', value=True, origin='')]
    facts = _facts(verdict, model, opened, rows, dict(images=200, seed=0, minutes=1.5), notes=['<b>a note'], controls=controls, cleaning=cleaning)
    if backdoored: facts['rebuilt'] = [dict(family='patch', inverted_asr=.97)]
    return Report(facts, samples, verdict)


CLEANED = dict(score_after=.7, named_after=None, controls_after=[{'class': 'sun', 'target': True, 'asr': .1}], kept=.99, drift=.02, asr_before=.98, asr_after=.01, asr_again=.05, removed=True, works_after=False, failed=None,
               layers=dict(layer1=.1, layer2=.8), layers_after=dict(layer1=.1, layer2=.1))


class Tags(HTMLParser):
    "The tags of a page and their attributes."
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text.append(data)


@pytest.mark.parametrize('report', [make(), make(False), make(cleaning=CLEANED)], ids=['bad', 'good', 'cleaned'])
def test_a_page_runs_nothing_and_loads_nothing(report):
    page = Tags(_page(report.facts, report.samples))
    tags = {t for t, _ in page.tags}
    assert not tags & {'script', 'link', 'iframe', 'object', 'embed', 'form', 'a', 'base', 'svg', 'b1'}
    for tag, attrs in page.tags:
        assert not any(k.startswith('on') for k in attrs)
        assert attrs.get('src', 'data:image/png').startswith('data:image/png')
        assert 'url(' not in attrs.get('style', '')
    assert 'http:' not in module._STYLE and 'url(' not in module._STYLE and '@import' not in module._STYLE
    policy = [a['content'] for t, a in page.tags if a.get('http-equiv') == 'Content-Security-Policy']
    assert policy and "default-src 'none'" in policy[0]


def test_names_are_text():
    page = Tags(_page(make().facts, make().samples))
    said = ''.join(page.text)
    assert all(name in said for name in NASTY) and '<script>model.pt' in said and '<b>a note' in said
    assert '<i>mean' in said and '0.5 0.25 1' in said and 'the tag <u> of open_clip' in said
    assert [a.get('src') for t, a in page.tags if t == 'img'].count('x') == 0


def test_a_notebook_shows_it_in_a_sandbox():
    html = make()._repr_html_()
    assert html.startswith('<iframe sandbox srcdoc=') and html.count('<') == 2 and [t for t, _ in Tags(html).tags] == ['iframe']


def test_words():
    assert make().facts['headline'].startswith("This model has a backdoor towards '<script>")
    assert make(False).facts['headline'] == 'No backdoor was found in this model.'
    assert make(cleaning=CLEANED).facts['headline'].endswith('It was removed.')
    said = lambda **kw: make(cleaning=CLEANED | dict(removed=False) | kw).facts['headline']
    assert 'no longer works, but a new scan still raises an alarm, towards \'sun\': it is not called clean.' in said(named_after='sun')
    assert said(works_after=True, asr_after=.4).endswith('still leads 40% of the images to the label, though a new scan raises no alarm.')
    assert said(works_after=True, asr_after=.4, named_after='sun').endswith("to the label, and a new scan still raises an alarm, towards 'sun'.")
    assert 'It was not removed: no trigger.' in make(cleaning=CLEANED | dict(failed='no trigger')).facts['headline']
    sure = lambda top: _how_sure(verdict_of('abcd', [top, 0., 0., 0.]))
    assert all(sure(s).startswith(f'This is {w}: ') for s, w in ((3., 'clear'), (1.5, 'likely'), (1.1, 'close to the limit'),
                                                                 (.9, 'close to the limit'), (.7, 'likely'), (.4, 'clear')))
    assert 'stands out from the others by 5.0 times what chance explains.' in sure(5.)
    assert 'Not looked at' in repr(make()) and make().facts['basis'].startswith(f"Of {len(NASTY)} labels")


def test_what_was_asked_is_shown_the_easiest_first():
    text = ''.join(Tags(_page(make(names=['sun', 'key', 'cloud', 'heart']).facts, [])).text)
    text = text[text.index('What was asked'):]
    assert f"{9.8 * limit_of(4):.1f}" in text and text.index('sun') < text.index('key') < text.index('cloud') < text.index('heart')


def test_it_is_saved_whole(tmp_path):
    page = make().save(tmp_path/'r')
    facts = json.loads((tmp_path/'r'/'report.json').read_text())
    assert page.name == 'report.html' and facts['verdict']['target'] == NASTY[0] and facts['classes'] == NASTY
    make(False).save(tmp_path/'r')
    assert not json.loads((tmp_path/'r'/'report.json').read_text())['verdict']['backdoored'] and os.listdir(tmp_path) == ['r']


def test_an_earlier_report_outlives_a_failure(tmp_path, monkeypatch):
    make().save(tmp_path/'r')
    before = (tmp_path/'r'/'report.html').read_text()
    def fail(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module, 'save_json', fail)
    with says('No space left on device.*untouched'): make(False).save(tmp_path/'r')
    assert (tmp_path/'r'/'report.html').read_text() == before and os.listdir(tmp_path) == ['r']
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(module, 'save_json', stop)
    with pytest.raises(KeyboardInterrupt): make(False).save(tmp_path/'r')
    assert (tmp_path/'r'/'report.html').read_text() == before and os.listdir(tmp_path) == ['r']


def test_numbers_that_are_none_are_not_written(tmp_path):
    report = make()
    report.facts['verdict']['score'] = float('nan')
    with says('not finite'): report.save(tmp_path/'r')
    assert os.listdir(tmp_path) == []


def test_other_folders_are_not_touched(tmp_path):
    (tmp_path/'own').mkdir(); (tmp_path/'own'/'thesis.tex').touch(); (tmp_path/'file').touch(); (tmp_path/'void').mkdir()
    with says('holds other things than a report'): make().save(tmp_path/'own')
    with says('is a file'): make().save(tmp_path/'file')
    make().save(tmp_path/'void')
    with says('nothing can be written'): _check_folder(tmp_path/'file'/'r')


def test_a_model_card_is_markdown(tmp_path):
    card = _model_card(make(cleaning=CLEANED).facts, "open_clip.create_model('RN50', pretrained='cleaned.safetensors')")
    assert card.startswith('# A cleaned CLIP') and 'leads to the label | 98.0% | 1.0% |' in card and '<script>alert' not in card


@pytest.mark.skipif(not shutil.which('chromium'), reason='there is no chromium')
@pytest.mark.parametrize('width', [1280, 400])
def test_a_browser_draws_it(tmp_path, width):
    "Nothing is wider than the page, and the picture is no blank."
    from PIL import Image
    page = make(cleaning=CLEANED).save(tmp_path/'r')
    shot = tmp_path/'shot.png'
    subprocess.run(['chromium', '--headless', '--no-sandbox', '--disable-gpu', f'--window-size={width},1600', '--hide-scrollbars',
                    f'--screenshot={shot}', page.as_uri()], check=True, capture_output=True, timeout=170, cwd=tmp_path)
    picture = Image.open(shot).convert('RGB')
    assert picture.width == width and len(picture.getcolors(2**24)) > 20
