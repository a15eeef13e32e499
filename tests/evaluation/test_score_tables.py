from fairseq_earm.evaluation.score_tables import Table, latex, latex_comment, latex_table, mean_and_spread, text_table

TABLE = Table("Scores, mean ± s.d.", ["system", "BLEU", "[0, ∞)"], [["E-ARM_3", "40.00 ± 1.00", "-"], ["a & b", "+0.5", "[-1.0, +2.0]"]])


def test_text_is_set_out_in_columns():
    assert text_table(TABLE).split("\n") == [
        "Scores, mean ± s.d.",
        "system           BLEU        [0, ∞)",
        "E-ARM_3  40.00 ± 1.00             -",
        "a & b            +0.5  [-1.0, +2.0]",
    ]


def test_latex_is_a_plain_tabular():
    assert latex_table(TABLE).split("\n") == [
        "% Scores, mean ± s.d.",
        r"\begin{tabular}{lrr}",
        r"\hline",
        r"system & BLEU & {[}0, $\infty$) \\",
        r"\hline",
        r"E-ARM\_3 & 40.00 $\pm$ 1.00 & - \\",
        r"a \& b & $+$0.5 & {[}$-$1.0, $+$2.0] \\",
        r"\hline",
        r"\end{tabular}",
    ]


def test_everything_that_latex_would_take_for_its_own_is_escaped():
    assert latex(r"a\b {c} ~d^ 5% $ # <|> *") == (
        r"a\textbackslash{}b \{c\} \textasciitilde{}d\textasciitilde{} 5\% \$ \# \textless{}\textbar{}\textgreater{} {*}"
    ).replace(r"d\textasciitilde{}", r"d\textasciicircum{}")
    assert latex("E-ARM-3 3e-4 x-1 -1") == "E-ARM-3 3e-4 x-1 $-$1"


def test_spread_over_seeds():
    assert mean_and_spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert mean_and_spread([2.5], digits=1) == "2.5"
    assert mean_and_spread([]) == "-"


def test_no_line_s_end_leaves_a_comment_or_a_row():
    """A carriage return alone ends a line for TeX; what came after it was set, and \\input read a file."""
    hostile = Table("a\rb\r\nc\nd", ["system", "x\ry"], [["a\n\n\rb", "\x1b1"]])
    lines = latex_table(hostile).split("\n")
    assert lines[:4] == ["% a", "% b", "% c", "% d"] and r"system & x y \\" in lines and r"a   b &  1 \\" in lines
    assert latex_comment("") == "%" and latex_comment("a\n\nb\n") == "% a\n%\n% b"
