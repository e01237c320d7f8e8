"""Classification and multiple choice: data sets whose rows have answers to choose from.

Whatever the format, a row gets `prompt`, `choices` (texts that follow the prompt as they stand),
`correct` (the place of the right one, None where the row does not say) and `completion` (the right
one). So one file trains, makes preference pairs and evaluates.
"""

import re

from ptjax import config

# The cloze prompt of the CS224n GPT-2 project. Its answers get a space in front instead of a line
# break, so that they are single tokens of most vocabularies.
PARAPHRASE = ('Question 1: "{}"\nQuestion 2: "{}"\n'
              'Are these questions asking the same thing?')
PARAPHRASE_ANSWERS = (' no', ' yes')  # by label


def recognise(columns):
  """Returns how to make our columns from those of a known format.

  Quora's and GLUE's question pairs (`sentence1` or `question1`, `sentence2` or `question2`,
  `is_duplicate`); ARC, as on the hub (`question`, `choices` of texts and labels, `answerKey`) or
  as published (a `question` with its `stem` and `choices`); HellaSwag (`ctx_a`, `ctx_b`,
  `activity_label`, `endings`, `label`); and `prompt`, `choices`, `label`, the label being a place
  counted from 0 or the text of a choice. ARC and HellaSwag are worded as in
  lm-evaluation-harness.

  Args:
    columns: names present.
  Returns:
    Dict of column name -> function of a row; empty where nothing is recognised.
  """
  columns = set(columns)
  for first, second in (('sentence1', 'sentence2'), ('question1', 'question2')):
    if {first, second, 'is_duplicate'} <= columns:
      return _columns(lambda row: _paraphrase(row, first, second))
  if {'question', 'answerKey'} <= columns:
    return _columns(_arc)
  if {'ctx_a', 'ctx_b', 'activity_label', 'endings', 'label'} <= columns:
    return _columns(_hellaswag)
  if {'prompt', 'choices', 'label'} <= columns:
    return _columns(lambda row: (row['prompt'], row['choices'], row['label']))
  return {}


def place(label, choices):
  """Returns the place of a label among choices, None for an empty one.

  Args:
    label: None, '', a place counted from 0 (3, 3.0, '3' or '3.0'), or the text of a choice.
    choices: texts.
  Raises:
    UserError: a label that is neither.
  """
  if label is None or label == '' or label != label:
    return None
  stripped = [choice.strip() for choice in choices]
  if isinstance(label, str) and label.strip() in stripped:
    return stripped.index(label.strip())
  try:
    number = float(label)
  except (TypeError, ValueError):
    number = -1.0
  if not number.is_integer() or not 0 <= number < len(choices):
    raise config.UserError(f'label {label!r}: expected a place from 0 to {len(choices) - 1} or one '
                           f'of the choices {", ".join(map(repr, stripped))}')
  return int(number)


def _columns(read):
  """Our four columns, from `read(row) -> (prompt, choices, label)`; choices None where missing."""
  def correct(row):
    _, choices, label = read(row)
    return place(label, choices) if choices else None

  def completion(row):
    found = correct(row)
    return None if found is None else read(row)[1][found]

  return {'prompt': lambda row: read(row)[0], 'choices': lambda row: read(row)[1],
          'correct': correct, 'completion': completion}


def _paraphrase(row, first, second):
  if not row[first] or not row[second]:
    return None, None, None
  prompt = PARAPHRASE.format(row[first].strip(), row[second].strip())
  return prompt, list(PARAPHRASE_ANSWERS), row['is_duplicate']


def _arc(row):
  question, choices = row['question'], row.get('choices')
  if isinstance(question, dict):
    question, choices = question.get('stem'), question.get('choices')
  if isinstance(choices, list):
    choices = {key: [choice[key] for choice in choices] for key in ('text', 'label')}
  if not question or not choices:
    return None, None, None
  if row['answerKey'] and row['answerKey'] not in choices['label']:
    raise config.UserError(f'answerKey {row["answerKey"]!r}: expected one of '
                           f'{", ".join(map(repr, choices["label"]))}')
  label = choices['label'].index(row['answerKey']) if row['answerKey'] else None
  return f'Question: {question}\nAnswer:', [f' {text}' for text in choices['text']], label


def _hellaswag(row):
  def clean(text):
    # Brackets are leftovers of WikiHow's layout.
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')
  prompt = clean(f'{row["activity_label"]}: {row["ctx_a"]} {row["ctx_b"].capitalize()}')
  return prompt, [f' {clean(ending)}' for ending in row['endings']], row['label']
