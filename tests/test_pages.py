"What a page says about results and the code."
import hashlib

import yaml

from invertune import pages


def test_results_of_an_earlier_code_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, 'ROOT', tmp_path)
    code = tmp_path/'invertune'/'a.py'
    code.parent.mkdir()
    code.write_text('x = 1')
    md5 = hashlib.md5(code.read_bytes()).hexdigest()
    model = dict(path='results/toy/m', md5='1')
    stages = {'train@toy': dict(deps=[dict(path='invertune/a.py', md5=md5)], outs=[model]), 'report@toy': dict(deps=[model])}
    lock = lambda: (tmp_path/'dvc.lock').write_text(yaml.safe_dump(dict(stages=stages)))
    lock()
    assert pages.made_by('toy', 'report') == 'this code' and pages.made_by('other', 'report') == '?'
    stages['report@toy'] = dict(deps=[dict(model, md5='0')])
    lock()
    assert pages.made_by('toy', 'report') == 'this code, from an earlier run of `train`'
    code.write_text('x = 2')
    assert pages.made_by('toy', 'report') == 'an earlier `a.py`, `train`'
    stages['report@toy'] = dict(deps=[model])
    lock()
    assert pages.made_by('toy', 'report') == 'an earlier `a.py`'
