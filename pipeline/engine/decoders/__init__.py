"""Decoder processes and the thread that feeds them: samples in, chunks of frames out.

A lane is one decoder process; it decodes one video at a time and may be killed.

- `feed`: the thread; assigns samples to lanes within a byte budget
- `lanes`, `process_lanes`: interface of a set of lanes; lanes as child processes
- `lane_process`, `lane_worker`, `lane_wire`: program of a decoder process; its code, which Ray actors share; messages on its pipe
- `lane_state`, `lane_sender`: what the feed knows of a lane; the thread that sends to one process
- `losses`: what follows for a sample whose decoder was lost
- `start_ups`, `exit_status`, `crash_report`: failed starts; how a process ended; the same where no exit status is known
- `arrival`: the video of a decoder on another machine
- `sample_stream`: a whole corpus as a stream of events, for `lathe plan` and `lathe evaluate`
"""
