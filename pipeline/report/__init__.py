"""`lathe report`: one page for people on one snapshot. `lathe serve`: pages and progress of an output in a browser.

- `values`: what a report says, as frozen records
- `collect`: all of it, from a store and the number of a snapshot
- `left_out`, `source_videos`, `row_sample`, `channels`, `history`, `pictures`: its parts: rejects and cost; length and size of
  sources; rows and histograms; values of latents; networks, builds and differences; decoded clips
- `page`, `charts`, `quality`: the page in HTML; its charts; histogram of PSNR and SSIM
- `written`: where page and values go
- `serving`: `lathe serve`: HTTP server for one output, on this machine only
"""
