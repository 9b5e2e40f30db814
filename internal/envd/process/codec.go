package process

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	rpc "github.com/wrenn/wrenn/api/proto/process"
)

// WithJSON has the service's JSON written and read by hand where there is most of
// it: a process's output, and keystrokes in the form in which the SDKs send them.
// Everything else is left to protojson.
func WithJSON() connect.HandlerOption {
	return connect.WithHandlerOptions(connect.WithCodec(jsonCodec{"json"}), connect.WithCodec(jsonCodec{"json; charset=utf-8"}))
}

// jsonCodec is ProtoJSON (https://protobuf.dev/programming-guides/json), under the
// name that it has in a content type.
type jsonCodec struct{ name string }

func (c jsonCodec) Name() string { return c.name }

func (c jsonCodec) Marshal(message any) ([]byte, error) { return c.MarshalAppend(nil, message) }

// MarshalAppend is Marshal into a buffer of the caller's.
func (c jsonCodec) MarshalAppend(to []byte, message any) ([]byte, error) {
	var data *rpc.ProcessEvent_DataEvent
	switch m := message.(type) {
	case *rpc.StartResponse:
		data = m.GetEvent().GetData()
	case *rpc.ConnectResponse:
		data = m.GetEvent().GetData()
	}
	switch output := data.GetOutput().(type) {
	case *rpc.ProcessEvent_DataEvent_Stdout:
		return appendOutput(to, "stdout", output.Stdout), nil
	case *rpc.ProcessEvent_DataEvent_Stderr:
		return appendOutput(to, "stderr", output.Stderr), nil
	case *rpc.ProcessEvent_DataEvent_Pty:
		return appendOutput(to, "pty", output.Pty), nil
	}
	m, ok := message.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is not a message", message)
	}
	return protojson.MarshalOptions{}.MarshalAppend(to, m)
}

func appendOutput(to []byte, kind string, data []byte) []byte {
	to = append(to, `{"event":{"data":{"`...)
	to = append(to, kind...)
	to = append(to, `":"`...)
	to = base64.StdEncoding.AppendEncode(to, data)
	return append(to, `"}}}`...)
}

// Unmarshal ignores fields it does not know, so that newer clients can send them.
func (c jsonCodec) Unmarshal(data []byte, message any) error {
	if request, ok := message.(*rpc.SendInputRequest); ok && readInput(data, request) {
		return nil
	}
	m, ok := message.(proto.Message)
	if !ok {
		return fmt.Errorf("%T is not a message", message)
	}
	if len(data) == 0 {
		return errors.New("the message is empty: want a JSON object")
	}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, m); err != nil {
		return fmt.Errorf("read message: %w", err)
	}
	return nil
}

// readInput reads {"process":{"pid":1},"input":{"pty":"YQ=="}} if data is exactly
// that but for the number, the kind and the base64. Otherwise it is false and
// request is as it was.
func readInput(data []byte, request *rpc.SendInputRequest) bool {
	rest, ok := bytes.CutPrefix(data, []byte(`{"process":{"pid":`))
	if !ok {
		return false
	}
	number, rest, ok := bytes.Cut(rest, []byte(`},"input":{"`))
	if !ok || len(number) == 0 || number[0] == '0' { // which JSON's numbers do not begin with
		return false
	}
	pid, err := strconv.ParseUint(string(number), 10, 32)
	if err != nil {
		return false
	}
	kind, rest, ok := bytes.Cut(rest, []byte(`":"`))
	if !ok {
		return false
	}
	text, ok := bytes.CutSuffix(rest, []byte(`"}}`))
	if !ok || bytes.ContainsAny(text, "\r\n") { // which base64 would skip
		return false
	}
	content, err := base64.StdEncoding.AppendDecode(make([]byte, 0, len(text)/4*3), text)
	if err != nil {
		return false
	}
	input := new(rpc.ProcessInput)
	switch string(kind) {
	case "stdin":
		input.Input = &rpc.ProcessInput_Stdin{Stdin: content}
	case "pty":
		input.Input = &rpc.ProcessInput_Pty{Pty: content}
	default:
		return false
	}
	request.Process = &rpc.ProcessSelector{Selector: &rpc.ProcessSelector_Pid{Pid: uint32(pid)}}
	request.Input = input
	return true
}
