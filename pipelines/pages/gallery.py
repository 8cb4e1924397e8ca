"""A query and its nearest pictures, as the macro `gallery` of parts.html shows them."""

from typing import NamedTuple


class Hit(NamedTuple):
    """A neighbour of a query.

    Attributes:
        picture: A data URL.
        label: Its class.
        right: Whether it is of the query's class.
        name: Of its file, for those who do not see it; empty: the class stands for it.
    """

    picture: str
    label: str
    right: bool
    name: str = ""


class Query(NamedTuple):
    """A query.

    Attributes:
        picture: A data URL.
        label: Its class.
        hits: Its nearest neighbours, the best first, by each way of ranking.
        name: As of Hit.
        note: What is to be said of it; empty: nothing.
    """

    picture: str
    label: str
    hits: dict[str, list[Hit]]
    name: str = ""
    note: str = ""
