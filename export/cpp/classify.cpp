// Classify one image with an exported model: onnxruntime's C++ API and the standard library, nothing else.
//
//     classify model.onnx picture.ppm [top]
//
// The picture is a binary PPM (P6, 8 bits a channel), or raw bytes of exactly the size that the model reads: RGB, row by
// row. Every image tool writes PPM: `magick cat.jpg -resize 32x32^ -gravity center -extent 32x32 cat.ppm`.
// The files of robustcompress say in their metadata how they read images (layout, type) and what they return.

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace {

struct Picture {
    int64_t height = 0, width = 0;
    std::vector<uint8_t> pixels;  // RGB, row by row
};

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + " cannot be read");
    return {std::istreambuf_iterator<char>(file), {}};
}

// One number of a PPM header, after white space and comments.
int64_t header_number(const std::string& content, size_t& at) {
    while (at < content.size() && (std::isspace(static_cast<unsigned char>(content[at])) || content[at] == '#')) {
        at = content[at] == '#' ? std::min(content.find('\n', at), content.size()) : at + 1;
    }
    int64_t value = 0;
    const size_t first = at;
    for (; at < content.size() && content[at] >= '0' && content[at] <= '9' && at - first < 9; ++at) {
        value = 10 * value + (content[at] - '0');
    }
    if (at == first) throw std::runtime_error("the PPM header is damaged");
    return value;
}

Picture read_picture(const std::string& path, int64_t height, int64_t width) {
    const std::string content = read_file(path);
    Picture picture{height, width, {}};
    size_t at = 0;
    if (content.compare(0, 2, "P6") == 0) {
        at = 2;
        picture.width = header_number(content, at);
        picture.height = header_number(content, at);
        if (header_number(content, at) != 255) throw std::runtime_error(path + ": only 8 bits a channel are read");
        ++at;  // the one white space behind the header
    }
    const int64_t wanted = 3 * picture.height * picture.width;
    if (picture.height < 1 || picture.width < 1 ||  // raw bytes for a model of any size have no size at all
        static_cast<int64_t>(content.size()) - static_cast<int64_t>(at) != wanted) {
        throw std::runtime_error(path + " is neither a whole P6 file nor raw RGB bytes of the model's size");
    }
    picture.pixels.assign(content.begin() + static_cast<std::ptrdiff_t>(at), content.end());
    if ((height > 0 && picture.height != height) || (width > 0 && picture.width != width)) {
        throw std::runtime_error(path + " has " + std::to_string(picture.width) + "x" + std::to_string(picture.height) +
                                 " pixels; the model reads " + std::to_string(width) + "x" + std::to_string(height) +
                                 ": resize it first");
    }
    return picture;
}

// The strings of a JSON array of strings, as the export writes it: UTF-8, with escapes for quotes and controls alone.
std::vector<std::string> read_strings(const std::string& json) {
    std::vector<std::string> found;
    bool inside = false;
    for (size_t i = 0; i < json.size(); ++i) {
        if (json[i] == '"') {
            if (!inside) found.emplace_back();
            inside = !inside;
        } else if (inside && json[i] == '\\' && i + 1 < json.size()) {
            const char escaped = json[++i];
            if (escaped == 'u') i += 4;
            // A name with a line break in it would break our own lines: white space does as well.
            found.back() += (escaped == '"' || escaped == '\\' || escaped == '/') ? escaped : ' ';
        } else if (inside) {
            found.back() += json[i];
        }
    }
    return found;
}

class Model {
   public:
    explicit Model(const std::string& path) : environment_(ORT_LOGGING_LEVEL_ERROR, "classify"), session_(nullptr) {
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(1);
        session_ = Ort::Session(environment_, std::basic_string<ORTCHAR_T>(path.begin(), path.end()).c_str(), options);
        if (session_.GetInputCount() != 1 || session_.GetOutputCount() != 1) {
            throw std::runtime_error(path + " must have one input and one output");
        }
        const Ort::TypeInfo type = session_.GetInputTypeInfo(0);
        const auto input = type.GetTensorTypeAndShapeInfo();
        shape_ = input.GetShape();
        type_ = input.GetElementType();
        nhwc_ = fact("layout") == "NHWC";
        if (shape_.size() != 4 || shape_[nhwc_ ? 3 : 1] != 3 ||
            (type_ != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && type_ != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8)) {
            throw std::runtime_error(path + " must read colour images, float32 or uint8");
        }
    }

    // Sizes that the model reads; -1 where it reads any.
    int64_t height() const { return shape_[nhwc_ ? 1 : 2]; }
    int64_t width() const { return shape_[nhwc_ ? 2 : 3]; }

    std::string fact(const std::string& key) const {
        const auto found = session_.GetModelMetadata().LookupCustomMetadataMapAllocated(
            ("robustcompress." + key).c_str(), Ort::AllocatorWithDefaultOptions());
        return found ? found.get() : "";
    }

    std::vector<float> probabilities(const Picture& picture) {
        const size_t area = static_cast<size_t>(picture.height * picture.width);
        std::vector<uint8_t> bytes(picture.pixels);
        if (!nhwc_) {
            for (size_t i = 0; i < area; ++i) {
                for (size_t c = 0; c < 3; ++c) bytes[c * area + i] = picture.pixels[3 * i + c];
            }
        }
        std::vector<int64_t> shape{std::max<int64_t>(shape_[0], 1), 3, picture.height, picture.width};
        if (nhwc_) shape = {shape[0], picture.height, picture.width, 3};
        std::vector<uint8_t> batch;  // of copies, where the model has a fixed batch
        for (int64_t i = 0; i < shape[0]; ++i) batch.insert(batch.end(), bytes.begin(), bytes.end());
        std::vector<float> floats(batch.begin(), batch.end());
        for (float& value : floats) value /= 255.0F;

        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        const Ort::Value input =
            type_ == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                ? Ort::Value::CreateTensor<float>(memory, floats.data(), floats.size(), shape.data(), shape.size())
                : Ort::Value::CreateTensor<uint8_t>(memory, batch.data(), batch.size(), shape.data(), shape.size());
        const Ort::AllocatorWithDefaultOptions allocator;
        const auto in = session_.GetInputNameAllocated(0, allocator), out = session_.GetOutputNameAllocated(0, allocator);
        const char *const inputs[] = {in.get()}, *const outputs[] = {out.get()};
        const auto result = session_.Run(Ort::RunOptions(), inputs, &input, 1, outputs, 1);
        const int64_t classes = result[0].GetTensorTypeAndShapeInfo().GetShape().at(1);
        const float* scores = result[0].GetTensorData<float>();
        std::vector<float> shares(scores, scores + classes);
        if (fact("output") == "probabilities") return shares;
        const float largest = *std::max_element(shares.begin(), shares.end());
        for (float& value : shares) value = std::exp(value - largest);
        const float sum = std::accumulate(shares.begin(), shares.end(), 0.0F);
        for (float& value : shares) value /= sum;
        return shares;
    }

   private:
    Ort::Env environment_;
    Ort::Session session_;
    std::vector<int64_t> shape_;
    ONNXTensorElementDataType type_ = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    bool nhwc_ = false;
};

}  // namespace

int main(int count, char** words) {
    if (count < 3 || count > 4) {
        std::cerr << "usage: classify model.onnx picture.ppm [top]\n";
        return 2;
    }
    try {
        Model model(words[1]);
        const std::vector<float> shares = model.probabilities(read_picture(words[2], model.height(), model.width()));
        const std::vector<std::string> names = read_strings(model.fact("classes"));
        std::vector<size_t> order(shares.size());
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return shares[a] > shares[b]; });
        const size_t top = count == 4 ? static_cast<size_t>(std::max(1, std::atoi(words[3]))) : 5;
        order.resize(std::min(top, order.size()));
        for (const size_t k : order) {
            const std::string name = k < names.size() ? names[k] : std::to_string(k);
            std::cout << std::fixed << std::setprecision(4) << shares[k] << "  " << name << '\n';
        }
    } catch (const std::exception& error) {  // Ort::Exception too
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
    return 0;
}
