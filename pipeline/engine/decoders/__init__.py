"""Decoder processes and the thread that feeds them: samples in, chunks of frames out.

A *lane* is one decoder process; it decodes one video at a time and may be killed.

- `feed`: the thread; assigns samples to lanes within a byte budget
- `lanes`, `lane_state`, `lane_sender`: the processes; what the feed knows of each; the thread that sends to one
- `start_ups`, `exit_status`, `crash_report`: failed starts; how a process ended; the same where the status is hidden
- `arrival`: a video for a decoder on another machine
- `sample_stream`: a whole corpus as a stream of events, for `lathe plan` and `lathe evaluate`
"""
