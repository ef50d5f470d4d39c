"""The server's certificate while it serves: renewed in time, taken up without a restart."""

import logging
import ssl

from common.errors import LinkError
from server.project import certificates
from server.project.project import Project

log = logging.getLogger(__name__)


class Identity:
    """What the server shows to whoever connects.

    Args:
      project: Whose server it is.

    Attributes:
      context: TLS for new connections.
      hosts: The names and addresses that the certificate is for.

    Raises:
      LinkError: there is no certificate, or its file cannot be used.
    """

    def __init__(self, project: Project) -> None:
        self._project, self._warned = project, ""
        self._content = b""
        self.context = _make_context()
        self.hosts: set[str] = set()
        self._take_up()

    def refresh(self) -> bool:
        """Renew the certificate if it is time, and take up another; whether there is another.

        What is wrong is said in the log, once; the old certificate goes on being shown.
        """
        project = self._project
        try:
            if certificates.renew_in_time(project.folder, project.settings.hosts):
                log.info("the server has a new key and certificate")
            changed = self._take_up()
            trouble = certificates.check_certificate(project.folder, project.settings.hosts)
        except (LinkError, OSError) as ex:
            changed, trouble = False, [str(ex)]
        if (text := " ".join(trouble)) != self._warned:
            self._warned = text
            if text:
                log.warning("%s", text)
        return changed

    def _take_up(self) -> bool:
        path = certificates.find_server_file(self._project.folder)
        try:
            content = path.read_bytes()
            if content == self._content:
                return False
            _make_context().load_cert_chain(path)  # one that is no good leaves the old in place
        except (OSError, ssl.SSLError):
            expected, got = "a key and its certificate, PEM", "something else"
            raise LinkError(path, expected=expected, got=got, remedy="Run renew.") from None
        self.context.load_cert_chain(path)
        self.hosts.clear()
        self.hosts |= certificates.read_names(self._project.folder)
        self._content = content
        return True


def _make_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
