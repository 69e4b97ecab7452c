"""Google Cloud Storage on this machine, in memory: gcp-storage-emulator with the header that TensorStore reads an
object's version from. The emulator itself does not send it.

    python -m tests.bucket.server PORT        # the bucket is gs://bucket
"""

import sys

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

original_download = objects.download


def download(request, response, storage, *args, **kwargs):
    """Answers a download, with the header that names the object's generation."""
    original_download(request, response, storage, *args, **kwargs)
    try:
        file = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = file["generation"]
    except NotFound:
        pass


if __name__ == "__main__":
    objects.download = download
    server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
