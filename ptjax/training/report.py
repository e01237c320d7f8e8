"""report.html: one page about a run, which opens without a network and holds only recorded numbers.

Every number comes from metrics.jsonl or samples.jsonl; its cell carries the metric's name, step
and full value in `data-` attributes beside the rounded text. What the run's data and settings say
is escaped, and the page forbids its reader's browser to load anything.
"""

import html
import json
import pathlib
import shlex

from absl import logging

from ptjax import config as settings
from ptjax.training import charts
from ptjax.training import metrics as metrics_files
from ptjax.training import run_folder

# Bounds that keep the page below about two megabytes whatever the run logs.
MAX_CHARTS = 80
MAX_PAIRS = 8
MAX_TEXT = 2000  # characters of a prompt or completion
MAX_SETTING = 300
MAX_FINDINGS = 50

# Shown open, in this order; all others stand folded below.
_MAIN = ('reward', 'loss', 'kl', 'entropy', 'completions/mean_length', 'grad_norm',
         'learning_rate', 'sampling/log_prob_gap_max')
_LEVELS = ('error', 'warning', 'info')

_STYLE = '''
:root { --ink: #1c2128; --faint: #6b7280; --line: #d8dde3; --paper: #fff; --mark: #1f6feb;
  --band: #1f6feb55; --tint: #f5f7fa; --error: #b42318; --warning: #9a6700; --info: #1f6feb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --faint: #9aa4b0; --line: #3a424c;
  --paper: #14181d; --mark: #6cb0ff; --band: #6cb0ff55; --tint: #1c2229; --error: #ff8f85;
  --warning: #e3b341; --info: #6cb0ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.about { color: var(--faint); margin: .2rem 0 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; }
small, .tick { color: var(--faint); fill: var(--faint); }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--tint); margin: .3rem 0;
  padding: .5rem .7rem; border-radius: 4px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } .tick { font-size: 10px; }
polyline { fill: none; stroke: var(--mark); stroke-width: 1.5; stroke-linejoin: round; }
circle { fill: var(--mark); } .grid { stroke: var(--line); }
.band { stroke: var(--band); stroke-width: 5; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-bottom: 1.2rem; }
.changed { font-weight: 600; }
.finding { border-left: 4px solid var(--info); padding: .1rem .8rem; margin: .5rem 0; }
.finding.error { border-color: var(--error); } .finding.warning { border-color: var(--warning); }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
'''


def write_report(out_dir):
  """Writes report.html from what the run left in `out_dir`; returns its path."""
  folder = pathlib.Path(out_dir)
  page = render(
      run=_read_json(folder / 'config.json', {}),
      records=metrics_files.read(folder / metrics_files.METRICS),
      samples=metrics_files.read(folder / metrics_files.SAMPLES),
      findings=_read_json(folder / 'findings.json', []))
  path = folder / 'report.html'
  run_folder.write_atomically(path, page)
  return path


def render(run, records, samples, findings=()):
  """The page as text, a pure function of the run's files.

  Args:
    run: the content of config.json, {} if lost.
    records: those of metrics.jsonl.
    samples: those of samples.jsonl.
    findings: strings, or dicts with `message` and maybe `level` (error, warning, info), `title`
      and `remedy`.
  """
  config = run.get('config', {})
  title = ' · '.join(str(config[k]) for k in ('algo', 'model', 'dataset') if k in config) or 'run'
  sections = [
      _section('Findings', _findings(findings)),
      _section('Evaluation', _evaluation(records)),
      _section('Metrics', _metrics(records)),
      _section('Curves', _curves(records)),
      _section('Samples', _samples(samples)),
      _section('To reproduce', _command(run)),
      _section('Settings', _config(config)),
      _section('Environment', _environment(run)),
  ]
  return (
      '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width, initial-scale=1">'
      '<meta http-equiv="Content-Security-Policy" '
      'content="default-src \'none\'; style-src \'unsafe-inline\'">'
      f'<title>{_escape(title)}</title><style>{_STYLE}</style></head>\n<body>'
      f'<h1>{_escape(title)}</h1>{_about(run, config, records)}\n'
      + '\n'.join(filter(None, sections)) + '\n</body></html>\n')


def _about(run, config, records):
  parts = []
  if records:
    step = records[-1]['step']
    parts.append(f'<span data-metric="step" data-step="{step}" data-value="{step}">{step}</span> '
                 'optimizer steps')
  else:
    parts.append('no step was taken')
  parts += [f'{name} {_escape(run[key])}' for name, key in
            (('seed', 'seed'), ('started', 'started')) if run.get(key) is not None]
  return f'<p class="about">{" · ".join(parts)}</p>'


def _findings(findings):
  blocks = []
  for finding in findings[:MAX_FINDINGS] if isinstance(findings, list) else ():
    if not isinstance(finding, dict):
      finding = {'message': finding}
    level = finding.get('level') if finding.get('level') in _LEVELS else 'info'
    text = ''.join(f'<div>{_escape(finding[key], MAX_TEXT)}</div>'
                   for key in ('message', 'remedy') if finding.get(key))
    heading = f'{level}: {finding["title"]}' if finding.get('title') else level
    blocks.append(f'<div class="finding {level}"><strong>{_escape(heading)}</strong>{text}</div>')
  return ''.join(blocks)


def _evaluation(records):
  """Each evaluation metric at the end of each stage, with its interval."""
  names = metrics_files.names(records, 'eval/')
  if not names:
    return ''
  stages = metrics_files.by_stage(records)
  rows = [_row('th', ['', *(_escape(stage) for stage in stages)])]
  for name in names:
    cells = [metrics_files.last(part, name) for part in stages.values()]
    rows.append(_row('td', [_escape(name), *(_estimate(record, name) for record in cells)]))
  return (f'<table>{"".join(rows)}</table><p><small>At the end of each stage; in brackets the '
          '95 % interval over the evaluated rows.</small></p>')


def _estimate(record, name):
  if record is None:
    return ''
  if metrics_files.interval(record, name) is None:
    return _number(record, name)
  low, high = (_number(record, name + part) for part in ('_low', '_high'))
  return f'{_number(record, name)} <small>[{low}, {high}]</small>'


def _metrics(records):
  """First, last, lowest and highest value of every metric within the last stage that has it."""
  rows = []
  for name in metrics_files.names(records):
    if name.startswith('eval/'):
      continue
    last = next(r for r in reversed(records) if name in r)
    part = [r for r in records if r.get('stage') == last.get('stage') and name in r]
    numbers = [r for r in part if _is_number(r[name])]
    if not numbers and not all(r[name] is None for r in part):
      continue  # text
    value = lambda record: record[name]
    extremes = [min(numbers, key=value), max(numbers, key=value)] if numbers else [last, last]
    rows.append(_row('td', [_escape(name), _escape(last.get('stage', '')),
                            *(_number(r, name) for r in (part[0], part[-1], *extremes))]))
  head = _row('th', ['', 'stage', 'first', 'last', 'lowest', 'highest'])
  return f'<table>{head}{"".join(rows)}</table>' if rows else ''


def _curves(records):
  drawn = {}
  for name in metrics_files.names(records):
    segments = _segments(records, name)
    if sum(len(segment) for segment in segments) >= 2:
      drawn[name] = segments
  main = [n for n in drawn if n.startswith('eval/') and '/acc_' in n]
  main += [n for n in _MAIN if n in drawn]
  others = [n for n in drawn if n not in main]
  shown = others[:MAX_CHARTS - len(main)]
  text = f'<div class="charts">{"".join(_figure(records, n, drawn[n]) for n in main)}</div>'
  if shown:
    dropped = len(others) - len(shown)
    note = f'; {dropped} more are in metrics.jsonl' if dropped else ''
    text += (f'<details><summary>{len(shown)} more{note}</summary><div class="charts">'
             f'{"".join(_figure(records, n, drawn[n]) for n in shown)}</div></details>')
  return text if drawn else ''


def _figure(records, name, segments):
  bands = [(r['step'], *metrics_files.interval(r, name)) for r in records
           if _is_number(r.get(name)) and metrics_files.interval(r, name) is not None]
  last = metrics_files.last(records, name)
  return (f'<figure>{charts.line_chart(name, segments, bands)}'
          f'<figcaption>{_escape(name)}: {_number(last, name)} '
          f'<small>at step {last["step"]}</small></figcaption></figure>')


def _segments(records, name):
  """Runs of (step, value) to draw as one line: a new stage or a value not finite ends a run."""
  segments, stage = [[]], None
  for record in records:
    if name not in record:
      continue
    if record.get('stage') != stage and not name.startswith('eval/') or record[name] is None:
      segments.append([])
    stage = record.get('stage')
    if _is_number(record[name]):
      segments[-1].append((record['step'], record[name]))
  return [segment for segment in segments if segment]


def _samples(samples):
  """The earliest and the latest completion of a prompt side by side."""
  samples = [s for s in samples if 'prompt' in s and 'completion' in s]
  if not samples:
    return ''
  first, last = min(s['step'] for s in samples), max(s['step'] for s in samples)
  if first == last:
    return '<div class="pair">' + ''.join(_sample(s) for s in samples[:MAX_PAIRS]) + '</div>'
  by_prompt = {}
  for sample in samples:
    by_prompt.setdefault(str(sample['prompt']), []).append(sample)
  pairs = [(group[0], group[-1]) for group in by_prompt.values()
           if group[0]['step'] < group[-1]['step']]
  if not pairs:  # every prompt was seen once: the first step's beside the last step's
    pairs = list(zip([s for s in samples if s['step'] == first],
                     [s for s in samples if s['step'] == last]))
  return ''.join(f'<div class="pair">{_sample(before)}{_sample(after)}</div>'
                 for before, after in pairs[:MAX_PAIRS])


def _sample(sample):
  facts = [f'step {sample["step"]}']
  for name, key in (('reward', 'reward'), ('tokens', 'completion_tokens')):
    if _is_number(sample.get(key)):
      facts.append(f'{name} {charts.spell(sample[key])}')
  if sample.get('truncated') is True:
    facts.append('cut at the length limit')
  return (f'<div><small>{_escape(" · ".join(facts))}</small>'
          f'<pre>{_escape(sample["prompt"], MAX_TEXT)}</pre>'
          f'<pre>{_escape(sample["completion"], MAX_TEXT)}</pre></div>')


def _command(run):
  argv = run.get('command')
  if not argv:
    return ''
  if pathlib.PurePath(argv[0]).name == 'launch.py':
    argv = ['python', '-m', 'ptjax.launch', *argv[1:]]
  return f'<pre>{_escape(shlex.join(str(a) for a in argv))}</pre>'


def _config(config):
  if not config:
    return ''
  changed = {key for key, _, _ in run_folder.changed_keys(
      settings.to_dict(settings.Config()), config)}
  rows = []
  for key, value in sorted(run_folder.flatten(config).items()):
    mark = ' class="changed"' if key in changed else ''
    rows.append(f'<tr{mark}><td>{_escape(key)}</td>'
                f'<td>{_escape(json.dumps(value, ensure_ascii=False), MAX_SETTING)}</td></tr>')
  return f'<p><small>Bold: not the default.</small></p><table>{"".join(rows)}</table>'


def _environment(run):
  facts = {**run.get('versions', {}), **run.get('devices', {})}
  if run.get('git_revision'):
    facts['git revision of ptjax'] = run['git_revision']
  rows = (_row('td', [_escape(name), _escape(value)]) for name, value in facts.items())
  return f'<table>{"".join(rows)}</table>' if facts else ''


def _section(title, body):
  return f'<section><h2>{_escape(title)}</h2>{body}</section>' if body else ''


def _row(tag, cells):
  """A table row; the first cell names it, the others hold numbers or text already escaped."""
  first, *rest = cells
  number = ' class="number"' if len(rest) > 1 else ''
  return (f'<tr><{tag}>{first}</{tag}>'
          + ''.join(f'<{tag}{number}>{cell}</{tag}>' for cell in rest) + '</tr>')


def _number(record, name):
  """A recorded number, rounded for the eye and whole in its attributes."""
  value = record[name]
  return (f'<span data-metric="{_escape(name)}" data-step="{record["step"]}" '
          f'data-value="{json.dumps(value)}">{charts.spell(value)}</span>')


def _is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _escape(value, limit=None):
  """Text as HTML shows it, cut to `limit` characters, without what no page may hold."""
  text = str(value)
  if limit is not None and len(text) > limit:
    text = f'{text[:limit]}... ({len(text) - limit} more characters)'
  text = ''.join(c if c >= ' ' or c in '\t\n' else '\ufffd' for c in text)
  return html.escape(text.encode('utf-8', 'replace').decode('utf-8'), quote=True)


def _read_json(path, default):
  """The file's content if it is of the default's type, else the default."""
  if not path.exists():
    return default
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    logging.warning('%s cannot be read (%s); the report goes without it', path, error)
    return default
  return content if isinstance(content, type(default)) else default
