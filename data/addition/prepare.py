"""Sums of numbers of up to two digits, a line each (12+34=46): 9,000 train and 1,000 val lines, no download.

--digits=3 draws 100,000 of the million pairs of numbers of up to three digits. --reverse writes the answer's
last digit first (12+34=64), the order in which sums are done. 12+34 and 34+12 are two lines.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.problems import check_range, line_parser, write_problems
from distrogpt.errors import cli_errors


def addition(a: int, b: int, reverse: bool = False) -> str:
    """A sum and its answer, without the newline."""
    answer = str(a + b)
    return f"{a}+{b}={answer[::-1] if reverse else answer}"


@cli_errors()
def main() -> None:
    parser = line_parser(sys.argv[0], __doc__.splitlines()[0])
    parser.add_argument(
        "--digits", type=int, default=2, metavar="N", help="of each number at most; default 2"
    )
    parser.add_argument("--reverse", action="store_true", help="the answer's last digit first")
    args = parser.parse_args()
    check_range(1, 9, digits=args.digits)
    end = 10**args.digits
    write_problems(args, end * end, lambda number: [addition(*divmod(number, end), args.reverse)])


if __name__ == "__main__":
    main()
