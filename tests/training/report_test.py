"""report.html: recorded numbers only, nothing from the network, no text of the run as code."""

import html.parser
import json
import math
import re

import pytest

from ptjax import config
from ptjax.training import charts
from ptjax.training import metrics
from ptjax.training import report
from ptjax.training import run_folder

HOSTILE = ('</script><script src="http://evil/x.js">alert(1)</script>'
           '<img src=x onerror="a()">\'"&\x00')


class _Page(html.parser.HTMLParser):
  """Collects what the tests look at; fails on tags that do not nest."""
  VOID = {'meta', 'link', 'img', 'br', 'line', 'circle', 'polyline'}

  def __init__(self, text):
    super().__init__()
    self.tags, self.numbers, self.pre, self.svgs = [], [], [], []
    self._open, self._number = [], None
    self.feed(text)
    self.close()
    assert not self._open, self._open

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.tags.append((tag, attributes))
    if tag == 'svg':
      self.svgs.append({**attributes, 'polylines': []})
    if tag == 'polyline':
      self.svgs[-1]['polylines'].append(attributes['points'])
    if 'data-value' in attributes:
      self._number = attributes
    if tag == 'pre':
      self.pre.append('')
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if self._number is not None:
      self.numbers.append((self._number['data-metric'], int(self._number['data-step']),
                           json.loads(self._number['data-value']), data))
      self._number = None
    if self._open and self._open[-1] == 'pre':
      self.pre[-1] += data


def _run(folder, steps=12, **settings):
  """A run of two stages with evaluations, as the launcher would leave it."""
  settings = config.Config(seed=7, **settings)
  run_folder.open_run(settings, folder, argv=['/x/ptjax/launch.py', '--algo=grpo', '--set',
                                              'loss.name=a b']).close()
  with metrics.MetricsWriter(folder, tensorboard=False) as writer:
    writer.write(0, {'stage': 'start', **_accuracy(0.0)})
    for step in range(1, steps + 1):
      stage = 'sft' if step <= steps // 3 else 'grpo'
      record = {'stage': stage, 'loss': math.sin(step) / 3, 'learning_rate': 1e-6 * step / 7,
                'num_tokens': 123457 * step, 'grad_norm': float('nan') if step == 6 else 2.0,
                'perf/compilations': 3, 'rewards/<b>x</b>/mean': step / 3}
      if stage == 'grpo':
        record['reward'] = 1 - 1 / step
      if step in (steps // 3, steps):
        record.update(_accuracy(step / (steps + 1)))
      writer.write(step, record)
      if step in (5, steps):
        writer.write_samples(step, [
            {'prompt': f'{i}+{i}=', 'completion': f'answer of step {step}', 'reward': step / 100,
             'completion_tokens': 3, 'truncated': step == 5} for i in range(3)])
  return folder


def _accuracy(value):
  return {'eval/sum/acc_strict': value, 'eval/sum/acc_strict_se': 0.01,
          'eval/sum/acc_strict_low': value * 0.9, 'eval/sum/acc_strict_high': value * 0.9 + 0.1}


def _write(folder):
  path = report.write_report(folder)
  assert path == folder / 'report.html'
  text = path.read_text(encoding='utf-8')
  return text, _Page(text)


def test_every_number_equals_metrics_jsonl(tmp_path):
  _, page = _write(_run(tmp_path))
  records = {r['step']: r for r in metrics.read(tmp_path / metrics.METRICS)}
  assert len(page.numbers) > 40
  for name, step, value, shown in page.numbers:
    assert value == records[step][name], (name, step)
    if value is None:
      assert shown == 'not finite'
    else:
      assert float(shown.replace(',', '')) == pytest.approx(value, rel=6e-4), (name, step)
  seen = {name for name, *_ in page.numbers}
  assert seen == {name for r in records.values() for name in r
                  if name != 'stage' and not name.endswith('_se')}


def test_the_table_has_first_last_and_extremes_of_the_last_stage(tmp_path):
  text, page = _write(_run(tmp_path))
  losses = {step: math.sin(step) / 3 for step in range(5, 13)}  # the grpo stage
  row = text[text.index('<td>loss</td>'):]
  found = [json.loads(v) for v in re.findall('data-value="([^"]*)"', row[:row.index('</tr>')])]
  assert found == [losses[5], losses[12], min(losses.values()), max(losses.values())]
  accuracy = [(step, value) for name, step, value, _ in page.numbers
              if name == 'eval/sum/acc_strict'][:3]
  assert accuracy == [(0, 0.0), (4, 4 / 13), (12, 12 / 13)]


def test_curves_can_be_read_back(tmp_path):
  _, page = _write(_run(tmp_path, steps=200))
  records = metrics.read(tmp_path / metrics.METRICS)
  assert {s['data-metric'] for s in page.svgs} >= {'loss', 'reward', 'eval/sum/acc_strict'}
  for svg in page.svgs:
    name = svg['data-metric']
    recorded = {r['step']: r[name] for r in records if r.get(name) is not None}
    x0, x1, y0, y1 = map(float, svg['data-range'].split())
    drawn = {}
    for point in ' '.join(svg['polylines']).split():
      x, y = map(float, point.split(','))
      step = x0 + (x - charts.LEFT) / (charts.WIDTH - charts.LEFT - charts.RIGHT) * (x1 - x0)
      height = charts.HEIGHT - charts.TOP - charts.BOTTOM
      drawn[round(step)] = y0 + (charts.HEIGHT - charts.BOTTOM - y) / height * (y1 - y0)
    assert drawn.keys() == recorded.keys(), name
    for step, value in drawn.items():  # coordinates have two decimals
      assert value == pytest.approx(recorded[step], abs=0.006 * (y1 - y0) / 100), (name, step)


def test_a_line_breaks_at_a_new_stage_and_at_a_value_that_is_not_finite(tmp_path):
  _, page = _write(_run(tmp_path))
  points = {s['data-metric']: [len(p.split()) for p in s['polylines']] for s in page.svgs}
  assert points['loss'] == [4, 8]
  assert points['grad_norm'] == [4, 1, 6]
  assert points['eval/sum/acc_strict'] == [3]


def test_nothing_is_fetched(tmp_path):
  text, page = _write(_run(tmp_path, dataset='https://example.com/data.jsonl'))
  assert 'https://example.com/data.jsonl' in text  # as text it may be there
  for tag, attributes in page.tags:
    assert tag not in ('script', 'link', 'img', 'iframe', 'object', 'embed', 'base', 'use')
    for name, value in attributes.items():
      assert name not in ('src', 'href', 'xlink:href', 'srcset', 'action', 'style')
      assert not name.startswith('on')
      assert '://' not in (value or '')
  style = text[text.index('<style>'):text.index('</style>')]
  assert 'url(' not in style and '@import' not in style
  assert "default-src 'none'" in text


def test_the_runs_text_is_escaped_everywhere(tmp_path):
  _run(tmp_path, algo=HOSTILE, loss={HOSTILE: HOSTILE})
  with open(tmp_path / metrics.METRICS, 'a') as f:
    f.write(json.dumps({'step': 13, 'stage': HOSTILE, HOSTILE: 1.5, f'eval/{HOSTILE}': 0.5}) + '\n')
  with open(tmp_path / metrics.SAMPLES, 'a') as f:
    f.write(json.dumps({'step': 13, 'prompt': '0+0=', 'completion': HOSTILE + '\ud800'}) + '\n')
  run = json.loads((tmp_path / 'config.json').read_text())
  run.update(command=[HOSTILE], git_revision=HOSTILE, seed=HOSTILE, started=HOSTILE)
  run['versions'][HOSTILE] = HOSTILE
  run['devices']['kind'] = HOSTILE
  (tmp_path / 'config.json').write_text(json.dumps(run))
  (tmp_path / 'findings.json').write_text(json.dumps(
      [HOSTILE, {'level': HOSTILE, 'title': HOSTILE, 'message': HOSTILE, 'remedy': HOSTILE}]))
  text, page = _write(tmp_path)
  assert '<script' not in text and '<img' not in text and '\x00' not in text
  assert text.count('&lt;script src=') > 15
  assert any(p.startswith('</script><script src=') for p in page.pre)
  assert {tag for tag, _ in page.tags} <= {
      'html', 'head', 'meta', 'title', 'style', 'body', 'h1', 'h2', 'p', 'span', 'section', 'div',
      'strong', 'table', 'tr', 'td', 'th', 'small', 'details', 'summary', 'figure', 'figcaption',
      'svg', 'line', 'text', 'polyline', 'circle', 'pre'}


def test_samples_stand_before_beside_after(tmp_path):
  text, page = _write(_run(tmp_path))
  assert page.pre[:4] == ['0+0=', 'answer of step 5', '0+0=', 'answer of step 12']
  assert 'step 5 · reward 0.05 · tokens 3 · cut at the length limit' in text
  assert 'step 12 · reward 0.12 · tokens 3<' in text


@pytest.mark.parametrize('samples,shown', [
    ([(1, 'a', 'A'), (9, 'b', 'B')], ['a', 'A', 'b', 'B']),  # no prompt in common
    ([(1, 'a', 'A'), (1, 'b', 'B')], ['a', 'A', 'b', 'B']),  # one step alone
    ([(1, 'b', 'B'), (1, 'a', 'A1'), (5, 'a', 'A5'), (9, 'a', 'A9'), (9, 'c', 'C')],
     ['a', 'A1', 'a', 'A9']),
    ([], [])])
def test_which_samples_are_paired(samples, shown):
  samples = [dict(zip(('step', 'prompt', 'completion'), s)) for s in samples]
  assert _Page(report.render({}, [], samples)).pre == shown


def test_settings_environment_and_command(tmp_path):
  text, page = _write(_run(tmp_path))
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert '<tr class="changed"><td>seed</td><td>7</td></tr>' in text
  assert '<tr><td>rollout.top_k</td><td>0</td></tr>' in text
  for key in run_folder.flatten(saved['config']):
    assert f'<td>{key}</td>' in text
  assert "python -m ptjax.launch --algo=grpo --set 'loss.name=a b'" in page.pre
  for name, version in saved['versions'].items():
    assert f'<tr><td>{name}</td><td>{version}</td></tr>' in text
  assert '12</span> optimizer steps' in text and 'seed 7' in text


def test_findings_show_first(tmp_path):
  _run(tmp_path)
  (tmp_path / 'findings.json').write_text(json.dumps([
      {'level': 'warning', 'title': 'entropy', 'message': 'it fell', 'remedy': 'raise it'},
      'plain', 3]))
  text, _ = _write(tmp_path)
  assert ('<div class="finding warning"><strong>warning: entropy</strong><div>it fell</div>'
          '<div>raise it</div></div>') in text
  assert '<div class="finding info"><strong>info</strong><div>plain</div></div>' in text
  assert text.index('<h2>Findings') < text.index('<h2>Evaluation') < text.index('<h2>Curves')


@pytest.mark.parametrize('content', ['{"torn', '{}', '3', ''])
def test_unreadable_findings_do_not_stop_the_report(tmp_path, content):
  _run(tmp_path)
  (tmp_path / 'findings.json').write_text(content)
  assert 'Findings' not in _write(tmp_path)[0]


def test_an_empty_folder_still_gets_a_page(tmp_path):
  text, page = _write(tmp_path)
  assert 'no step was taken' in text and page.svgs == [] and page.numbers == []


def test_the_page_stays_small(tmp_path):
  _run(tmp_path, loss={'x': 'y' * 10**6})
  with open(tmp_path / metrics.METRICS, 'w') as f:
    for step in range(1, 1001):
      values = {f'm{i}': math.sin(step * i) for i in range(100)}
      f.write(json.dumps({'step': step, **values}) + '\n')
  with open(tmp_path / metrics.SAMPLES, 'w') as f:
    for step in (1, 2):
      for i in range(30):
        sample = {'step': step, 'prompt': f'{i}' * 9999, 'completion': 'é' * 99999}
        f.write(json.dumps(sample) + '\n')
  (tmp_path / 'findings.json').write_text(json.dumps(['z' * 10**5] * 999))
  text, page = _write(tmp_path)
  assert len(text.encode()) < 2_000_000
  assert len(page.svgs) == report.MAX_CHARTS and 'more are in metrics.jsonl' in text
  assert 'more characters)' in text
