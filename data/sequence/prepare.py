"""Arithmetic sequences to continue (17,20,23=26,29,32): 7,290 train and 810 val lines.

A line has three numbers and the three that follow. The first number is from 0 to 899 (--highest), the step
from 1 to 9 (--steps). No download.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.problems import check_range, line_parser, write_problems
from distrogpt.errors import CLOSE_OTHERS, cli_errors


@cli_errors(CLOSE_OTHERS)
def main() -> None:
    parser = line_parser(sys.argv[0], __doc__.splitlines()[0])
    parser.add_argument(
        "--highest", type=int, default=899, metavar="N", help="highest first number (default: 899)"
    )
    parser.add_argument("--steps", type=int, default=9, metavar="N", help="highest step (default: 9)")
    args = parser.parse_args()
    check_range(0, 10**9, highest=args.highest)
    check_range(1, 10**9, steps=args.steps)

    def lines_of(number: int) -> list[str]:
        first, step = divmod(number, args.steps)
        numbers = [str(first + (step + 1) * i) for i in range(6)]
        return [f"{','.join(numbers[:3])}={','.join(numbers[3:])}"]

    write_problems(args, (args.highest + 1) * args.steps, lines_of)


if __name__ == "__main__":
    main()
