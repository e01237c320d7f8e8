"""What a loss does to each token, for any loss and any batch.

    from ptjax import inspect
    found = inspect.inspect_loss('grpo', inspect.example.batch())
    print(found.table())
    inspect.plot(found, 'grpo.png')

and `python -m ptjax.inspect --algo=grpo` from a shell.
"""

from ptjax.inspect import example
from ptjax.inspect.sweep import Curve
from ptjax.inspect.sweep import curve
from ptjax.inspect.picture import plot
from ptjax.inspect.weights import Inspection
from ptjax.inspect.weights import inspect_loss
