"What a page says about results and the code, and what the site holds."
import hashlib
import json
import re

import pytest
import yaml

from invertune.run import pages, record


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A checkout with a lock, costs and one page of results."
    monkeypatch.setattr(pages, 'ROOT', tmp_path)
    for module in (pages, record): monkeypatch.setattr(module, 'RESULTS', tmp_path/'results')
    code = tmp_path/'invertune'/'a.py'
    code.parent.mkdir()
    code.write_text('x = 1')
    folder = tmp_path/'results'/'toy'/'main'
    folder.mkdir(parents=True)
    (folder/'README.md').write_text('# main\n\n**Why?**\n\n![x](figure.png)\n\n- One.\n- Two.\n\n'
                                    '## Summary\n\n[r](report.ipynb)\n')
    return tmp_path


def lock(root, **stages):
    stages = {n.replace('_at_', '@').replace('_', '-'): s for n, s in stages.items()}
    (root/'dvc.lock').write_text(yaml.safe_dump(dict(stages=stages)))


def test_results_of_an_earlier_code_are_named(toy):
    code = toy/'invertune'/'a.py'
    md5 = hashlib.md5(code.read_bytes()).hexdigest()
    model = dict(path='results/toy/m', md5='1')
    train = dict(deps=[dict(path='invertune/a.py', md5=md5)], outs=[model])
    lock(toy, train_at_toy=train, report_main_at_toy=dict(deps=[model]))
    assert pages.made_by('toy', 'main') == 'this code' and pages.made_by('other', 'main') == '?'
    lock(toy, train_at_toy=train, report_main_at_toy=dict(deps=[dict(model, md5='0')]))
    assert pages.made_by('toy', 'main') == 'this code, from an earlier run of `train`'
    code.write_text('x = 2')
    assert pages.made_by('toy', 'main') == 'an earlier `a.py`, `train`'
    lock(toy, train_at_toy=train, report_main_at_toy=dict(deps=[model]))
    assert pages.made_by('toy', 'main') == 'an earlier `a.py`'


def test_an_experiment_costs_what_it_adds_to_the_main_job(toy):
    model, rows = dict(path='results/toy/m', md5='1'), dict(path='results/toy/r', md5='1')
    lock(toy, train_at_toy=dict(outs=[model]), report_main_at_toy=dict(deps=[model]),
         scarce_at_toy=dict(deps=[model], outs=[rows]), report_scarce_at_toy=dict(deps=[rows]))
    costs = {'train@toy': 1200, 'report-main@toy': 0, 'scarce@toy': 240, 'report-scarce@toy': 0, 'other@toy': 9999}
    costs = {n: dict(seconds=2*s, cpu=s, peak_mb=1024) for n, s in costs.items()}
    (toy/'results'/'toy'/'costs.json').write_text(json.dumps(costs))
    assert pages.cost_of('toy', 'main') == '10 min, 1.0 GB' and pages.cost_of('toy', 'scarce') == '2 min, 1.0 GB'
    assert pages.cost_of('toy', 'verdict') == '?'
    (toy/'results'/'toy'/'costs.json').write_text(json.dumps({n: c for n, c in costs.items() if n != 'scarce@toy'}))
    assert pages.cost_of('toy', 'scarce') == '?'  # half a sum is none


def test_pages_quote_an_experiment(toy):
    assert pages.said('toy', 'main') == '- One.\n- Two.' and pages.said('toy', 'main', 1) == '- One.'
    part = pages.folded('toy', 'main')
    assert part.startswith('## main') and '### Summary' in part
    assert '![x](../results/toy/main/figure.png)' in part and '[r](../results/toy/main/report.ipynb)' in part


@pytest.mark.parametrize('page', pages._PAGES)
def test_links_of_a_page_lead_somewhere(page):
    "Into the checkout, but for results that are not made yet."
    file = pages.ROOT/page
    links = re.findall(r'\]\((?!\w+:|#)([^)\s#]+)', file.read_text(encoding='utf-8'))
    lost = [x for x in links if not (file.parent/x).exists() and not re.search(r'(^|/)(glyphs|photos)/', x)]
    assert links and lost == []


def test_the_site(tmp_path):
    "Every notebook and page is there, formulas are MathML, and nothing is asked of a network."
    pytest.importorskip('sphinx')
    pages._build_docs(tmp_path/'docs')
    made = {p.relative_to(tmp_path/'docs').with_suffix('').as_posix(): p.read_text(encoding='utf-8')
            for p in (tmp_path/'docs').rglob('*.html')}
    books = [p.relative_to(pages.ROOT).with_suffix('').as_posix() for p in pages.NBS.rglob('[0-9]*.ipynb')]
    assert [b for b in [*books, 'README', 'ARTIFACT', 'results/README', 'search'] if b not in made] == []
    assert '<math' in made['nbs/method/12_invert'] and '#| export' not in made['nbs/method/12_invert']
    asked = r'<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)="(?:https?:)?//[^"]+"'
    assert [(name, m) for name, text in made.items() for m in re.findall(asked, text)] == []
    css = [p.read_text(encoding='utf-8', errors='replace') for p in (tmp_path/'docs').rglob('*.css')]
    assert [m for text in css for m in re.findall(r'url\(["\']?(?:https?:)?//[^)]+\)', text)] == []
    assert (tmp_path/'docs'/'searchindex.js').stat().st_size > 10_000
