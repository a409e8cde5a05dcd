"""The game's data for one regime: `python -m pear_ray.embedded.automaton OUT --length 130`."""

import argparse
from pathlib import Path

from pear_ray.embedded.automaton.game import completion_tokens, recited_for
from pear_ray.embedded.automaton.generate import Settings, write_data
from pear_ray.embedded.automaton.teacher import Teacher


def main() -> None:
    """Write corpus.parquet, three problem files and settings.json into a folder."""
    parser = _parser()
    given = parser.parse_args()
    try:
        teacher = Teacher(
            plain_share=given.share,
            distance=given.teacher_distance,
            slip=given.slip,
            free=given.free,
        )
        settings = Settings(
            teacher=teacher,
            length=given.length,
            rows=given.rows,
            logprobs=given.logprobs,
            changed=given.changed,
            seed=given.seed,
        )
        write_data(given.output, settings)
    except ValueError as error:
        parser.error(str(error))
    found = completion_tokens(recited_for(given.length))
    print(f"{given.output}: {given.rows} rows of {found} tokens, and three problem sets")


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m pear_ray.embedded.automaton",
        description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="folder that the files go to")
    parser.add_argument("--seed", type=int, default=default.seed, help="of programs and samples")
    parser.add_argument("--rows", type=int, default=default.rows, help="rows of the corpus")
    parser.add_argument(
        "--length", type=int, default=default.length, help="tokens of a completion, 60 to 200"
    )
    parser.add_argument(
        "--share", type=float, default=default.teacher.plain_share, help="of style F"
    )
    parser.add_argument(
        "--teacher-distance",
        type=float,
        default=default.teacher.distance,
        help="share of N's letters that follow the key; 0: a student can learn their distribution",
    )
    parser.add_argument(
        "--slip", type=float, default=default.teacher.slip, help="probability of a wrong state"
    )
    parser.add_argument(
        "--free",
        type=float,
        default=default.teacher.free,
        help="probability that a recited letter is any of them: nothing depends on it",
    )
    parser.add_argument(
        "--logprobs",
        choices=("teacher", "proxy"),
        default=default.logprobs,
        help="the teacher's own, or those of one that does not know the key",
    )
    parser.add_argument(
        "--changed",
        type=int,
        default=default.changed,
        help="operations of game A that do something else than the student has learnt",
    )
    return parser


if __name__ == "__main__":
    main()
