"""A customer of the shop: `python -m customer ada "A text."` prints the API's answer."""

import os
import sys

import httpx

if __name__ == "__main__":
    name, text = sys.argv[1:]
    url = os.environ.get("SHOP_URL", "http://127.0.0.1:8001") + "/summaries"
    answer = httpx.post(url, json={"text": text}, headers={"X-Customer": name}, timeout=60)
    print(answer.status_code, answer.text)
    sys.exit(answer.is_error)
