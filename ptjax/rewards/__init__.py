"""Text in, numbers out, on the host: `f(prompts, completions, **columns) -> list[float | None]`.

`combine.load` turns `--reward` specs into one scorer; everything else here is a reward function or
what one needs. Nothing in this room imports jax.
"""
