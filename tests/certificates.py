"""Certificates for servers of the tests, made with openssl."""

import ssl
import subprocess


class Certificates:
    """An authority, and servers whose certificates it has signed, or has not."""

    def __init__(self, directory):
        self._directory = directory
        self._config = directory / "openssl.cnf"
        self._config.write_text(
            f"[ca]\ndefault_ca=a\n[a]\ndatabase={directory}/index\nnew_certs_dir={directory}\n"
            "rand_serial=yes\ndefault_md=sha256\npolicy=p\nunique_subject=no\ncopy_extensions=copy\n"
            "[p]\ncommonName=supplied\n[req]\ndistinguished_name=d\n[d]\n"
        )
        (directory / "index").touch()
        self.ca = self._make("Test", "-x509", "-addext", "basicConstraints=critical,CA:TRUE")

    def server(self, name, *, until="20990101000000Z"):
        request = self._make(name, "-addext", f"subjectAltName=DNS:{name}")
        certificate = f"{request}.signed"
        self._openssl(
            *("ca", "-batch", "-notext", "-in", request, "-out", certificate),
            *("-cert", self.ca, "-keyfile", f"{self.ca}.key"),
            *("-startdate", "20200101000000Z", "-enddate", until),
        )
        return self._context(certificate, f"{request}.key")

    def self_signed(self, name):
        certificate = self._make(name, "-x509", "-addext", f"subjectAltName=DNS:{name}")
        return self._context(certificate, f"{certificate}.key")

    def _make(self, name, *arguments):
        path = str(self._directory / f"{name}-{len(list(self._directory.iterdir()))}")
        self._openssl(
            *("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", f"/CN={name}", "-keyout", f"{path}.key", "-out", path, *arguments),
        )
        return path

    def _openssl(self, command, *arguments):
        full = ["openssl", command, "-config", str(self._config), *arguments]
        subprocess.run(full, check=True, capture_output=True)

    def _context(self, certificate, key):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context
