"""H08 in small: mutations of valid requests, by the same means as `./run fuzz`."""

from tests.faults.world import check
from tests.soak.fuzz import Fuzz
from tests.wire import post


def test_h08_no_mutation_of_a_request_is_more_than_refused(service):
    host, _, port = service.base_url.removeprefix("http://").partition(":")
    one = Fuzz((host, int(port)), "suite")

    one.send(iter(range(500)))

    assert one.faults == []
    assert one.sent == 500
    check(service, post(), [200], 1)
