"""The suffix game: an automaton, a scripted teacher of two styles, and a student that knows one.

Data of any regime: `python -m pear_ray.embedded.automaton OUT`. The student:
`python -m pear_ray.embedded.automaton.train`. What is shipped is in README.md.
"""
