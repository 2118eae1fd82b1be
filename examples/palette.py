"""The colours of every picture: Okabe and Ito's, which colour-blind people can tell apart.

Source: https://jfly.uni-koeln.de/color/
"""

LIBRARIES = {'xtloss': '#0072B2', 'x-transformers': '#E69F00'}
OTHERS = '#999999'  # other libraries, and what is no library
WEIGHTINGS = {
    'token': '#56B4E9',
    'square': '#009E73',
    'sequence': '#D55E00',
    'padded': '#CC79A7',
    'sequence_sum': '#000000',
}
CYCLE = ('#56B4E9', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#0072B2', '#000000', '#999999')
LONGEST_LABEL = 30  # characters


def label(name: str) -> str:
    """Return a name as a picture can show it: not too long, and a $ in it is no formula."""
    short = name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + '…'
    return short.replace('$', r'\$')
