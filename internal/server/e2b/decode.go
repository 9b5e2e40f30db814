package e2b

import (
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/http"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// maxBody bounds a request's body in bytes.
const maxBody = 1 << 20

// decode reads the JSON object of a request's body into v. Unknown fields are
// ignored; an empty body leaves v as it is and is reported.
func decode(r *http.Request, v any) (empty bool, err error) {
	body, err := io.ReadAll(r.Body)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return false, &statusError{status: http.StatusRequestEntityTooLarge, message: "request body is larger than " + strconv.Itoa(maxBody) + " bytes"}
	case err != nil:
		return false, invalid("request body could not be read")
	case len(strings.TrimSpace(string(body))) == 0:
		return true, nil
	}
	if err := json.Unmarshal(body, v); err != nil {
		var wrongType *json.UnmarshalTypeError
		if errors.As(err, &wrongType) {
			where := wrongType.Field
			if where == "" {
				where = "request body"
			}
			return false, invalid("%s: want %s, got %s", where, jsonKind(wrongType.Type), wrongType.Value)
		}
		return false, invalid("request body is not valid JSON: %v", err)
	}
	return false, nil
}

// decodeRequired is decode for operations that need a body.
func decodeRequired(r *http.Request, v any) error {
	empty, err := decode(r, v)
	if err == nil && empty {
		err = invalid("request body is missing")
	}
	return err
}

// jsonKind names the type that a field should have had in words of JSON.
func jsonKind(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "a boolean"
	case reflect.String:
		return "a string"
	case reflect.Slice, reflect.Array:
		return "an array"
	case reflect.Struct, reflect.Map:
		return "an object"
	case reflect.Float64:
		return "a number"
	}
	return "an integer of up to 64 bits"
}

// seconds turns a number of seconds into a duration. Numbers beyond any
// duration become the longest one, for the limit check to refuse.
func seconds(n int64) time.Duration {
	const most = math.MaxInt64 / int64(time.Second)
	return time.Duration(min(max(n, -most), most)) * time.Second
}

// sandboxID takes the id from the path, where old clients send "{id}-{client}".
// What cannot be an id is not found, like any other that there is not.
func (c *call) sandboxID() (sandbox.ID, error) {
	plain, _, _ := strings.Cut(c.params["sandboxID"], "-")
	id, err := sandbox.ParseID(plain)
	if err != nil {
		return "", sandbox.Errorf(sandbox.ErrNotFound, "sandbox %q not found", clip(c.params["sandboxID"]))
	}
	return id, nil
}

// integer reads a number from the query, within bounds.
func (c *call) integer(name string, fallback, least, most int64) (int64, error) {
	values, err := c.query()
	if err != nil {
		return 0, err
	}
	text := values.Get(name)
	if text == "" {
		return fallback, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < least || n > most {
		return 0, invalid("%s: want an integer from %d to %d", name, least, most)
	}
	return n, nil
}

func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
