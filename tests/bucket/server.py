"""Google Cloud Storage on this machine, in memory: gcp-storage-emulator, and the header that TensorStore reads an
object's version from, which it leaves out.

    python -m tests.bucket.server PORT        # the bucket is gs://bucket
"""

import sys

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

plain = objects.download


def download(request, response, storage, *args, **kwargs):
    plain(request, response, storage, *args, **kwargs)
    try:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]
    except NotFound:
        pass


if __name__ == "__main__":
    objects.download = download
    server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
